"""The command line: one codec walks through every command, and every mistake is told in a line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from signlattice import __version__, cli
from signlattice.cache import storage
from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cli import main
from signlattice.cli.show import plain, size, span, table
from signlattice.evaluation.through_cache import QualityConfig
from signlattice.io import locked
from signlattice.models import full_size
from signlattice.quantizers import basis, codec, lattice, scales
from signlattice.quantizers.codec import KeyCodec

MODEL = "gemma4-e2b-mini"
COMMANDS = ("learn", "measure", "evaluate", "generate", "bench", "inspect", "resave", "estimate")


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[dict, str]:
    """The document of a command that succeeds, and what it said meanwhile."""
    assert main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def told(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What a command that fails says, in one line."""
    assert main([*map(str, arguments), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("signlattice: ") and err.count("\n") == 1
    return err


def misused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of `MODEL`."""
    file = tmp_path_factory.mktemp("cli") / "codec.safetensors"
    assert main(["learn", MODEL, "-o", str(file), "--keys-per-dim", "64", "--quiet"]) == 0
    return file


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "own.txt"
    lines = (f"def f{i}(x):\n    return x + {i * i % 97}\n\n" for i in range(1500))
    file.write_text("".join(lines))
    return file


# Each command.


def test_cli_estimate_reads_a_checkpoint_and_loads_nothing(capsys):
    document, err = run(capsys, "estimate", MODEL, "--tokens", 1000, "--context", 64)
    assert (document["model"], document["dtype"], err) == (MODEL, "float32", "")
    assert document["download_bytes"] == 0 and document["context"] == 64
    # The last two of six layers reuse keys; one of the others attends to the whole context.
    assert document["keys"] == [
        {"layers": 3, "heads": 1, "head_dim": 64},
        {"layers": 1, "heads": 1, "head_dim": 128},
    ]
    assert document["key_bytes"] == 1000 * (3 * 64 + 128) * 2  # half precision
    hours = document["hours"]
    assert [row["n_gpus"] for row in hours] == [1, 8, 1, 8]
    assert all(row["hours"] > 0 for row in hours)


def test_cli_estimate_names_a_value_that_is_wrong(capsys):
    assert "--tokens: '0': use a whole number" in misused(capsys, "estimate", "m", "--tokens", 0)
    assert "leave it out" in told(capsys, "estimate", MODEL, "--revision", "main")


def test_cli_learn_keeps_what_was_learned_and_leaves_nothing_beside_it(learned):
    assert [file.name for file in learned.parent.iterdir()] == [learned.name]
    found = KeyCodec.load(learned)
    assert found.provenance["model"] == MODEL
    assert found.provenance["text"] == "corpus"


def test_cli_inspect_needs_no_model(learned, capsys):
    found, err = run(capsys, "inspect", learned)
    assert err == ""
    assert (found["schema"], found["bits"], found["version"]) == (codec.SCHEMA, 8, __version__)
    assert len(found["model_hash"]) == len(found["calibration_hash"]) == 64
    assert found["n_keys"] == 64 * 128
    assert found["bytes"] == learned.stat().st_size
    assert found["provenance"]["model"] == MODEL
    (layer,) = found["layers"]
    assert (layer["layer"], layer["heads"], layer["head_dim"]) == (2, 1, 128)
    assert (layer["code"], layer["scale"], layer["temperature"]) == ("lattice", "unbiased", None)
    assert 0.8 < layer["beta"][0] < 1


def test_cli_measure_is_held_out_and_near_what_the_codec_says(learned, capsys):
    found, err = run(capsys, "measure", MODEL, learned, "--passages", 6)
    assert "6 windows" in err
    (head,) = found["heads"]
    beta = KeyCodec.load(learned).calibration.beta[2][0]
    assert head["beta"] == pytest.approx(beta, abs=0.02)
    assert found["mean"]["kl"] == pytest.approx(head["kl"]) and head["kl"] > 0
    assert 0 < head["distortion"] < 1 and 0 < head["top1"] <= 1


def test_cli_evaluate_puts_the_cache_beside_exact_attention_and_other_caches(learned, capsys):
    found, err = run(
        capsys, "evaluate", MODEL, learned, "--values", "int8", "--window", 32, "--passages", 2
    )
    assert "100%" in err
    rows = {row["cache"]: row for row in found["rows"]}
    assert list(rows) == ["exact", "signs, int8 values", "fp16", "fp8", "int4", "int2"]
    exact, signs, fp16 = rows["exact"], rows["signs, int8 values"], rows["fp16"]
    assert (signs["window"], signs["sinks"], signs["sliding"]) == (32, 4, "full")
    assert (fp16["window"], fp16["sinks"], fp16["bits"]) == (0, 0, 16)
    assert signs["n_packed"] > 0
    assert abs(fp16["gap"]) < 0.1 < abs(signs["gap"])
    assert signs["bits"] < rows["fp8"]["bits"] < fp16["bits"] <= exact["bits"]
    assert signs["gap_low"] <= signs["gap"] <= signs["gap_high"]
    assert all(0 <= row["needle"] <= 1 for row in rows.values())
    assert all("kl" in row and "reduction" in row for row in found["rows"][1:])


def test_cli_generate_goes_on_with_exact_keys_and_through_the_cache(learned, capsys):
    found, _ = run(
        capsys,
        "generate",
        MODEL,
        learned,
        "class Graph:\n    def ",
        "--window",
        4,
        "--sinks",
        1,
        "--max-new-tokens",
        12,
    )
    assert len(found["tokens"]["exact"]) == len(found["tokens"]["cached"]) == 12
    assert found["agree"] == (found["tokens"]["exact"] == found["tokens"]["cached"])
    assert (found["first_difference"] is None) == found["agree"]
    assert found["cache"]["n_packed"] > 0
    assert found["cache"]["n_tokens"] == found["prompt_tokens"] + 11


def test_cli_generate_reads_stdin_draws_by_its_seed_and_says_if_nothing_was_packed(
    learned, capsys, monkeypatch, tmp_path
):
    prompt = tmp_path / "prompt"
    prompt.write_text("import math\n")
    texts = []
    for seed in (0, 0, 1):
        with prompt.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert (
                main(
                    [
                        "generate",
                        MODEL,
                        str(learned),
                        "-",
                        "--sample",
                        "--seed",
                        str(seed),
                        "--top-p",
                        "0.9",
                        "--max-new-tokens",
                        "8",
                    ]
                )
                == 0
            )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert "agree in all 8 tokens" in texts[0]
    assert "no key seen through its code" in texts[0]


@pytest.mark.slow
def test_cli_bench_names_the_device_and_sets_torch_beside(capsys):
    found, _ = run(
        capsys,
        "bench",
        "--tokens",
        256,
        "--heads",
        1,
        "--head-dim",
        64,
        "--rounds",
        1,
        "--device",
        "cpu",
    )
    assert "threads" in found["device"]
    names = {row["contender"] for row in found["rows"]}
    assert {"1-bit K, bf16 V", "1-bit K, 4-bit V", "SDPA bf16"} <= names
    assert all(row["seconds_low"] <= row["seconds"] <= row["seconds_high"] for row in found["rows"])


def test_cli_takes_any_checkpoint_and_any_text_the_whole_way(
    llama_folder, own_text, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("signlattice.cli.commands.LARGEST_SHARE", 0.01)
    file = tmp_path / "new" / "codec.safetensors"
    learn = (
        "learn",
        llama_folder,
        "-o",
        file,
        "--text",
        own_text,
        "--code",
        "rotation",
        "--scale",
        "mse",
        "--temperature",
        "--keys-per-dim",
        32,
    )
    for command in (
        learn,
        ("inspect", file),
        ("measure", llama_folder, file, "--text", own_text, "--passages", 4),
        ("evaluate", llama_folder, file, "--text", own_text, "--window", 8, "--passages", 2),
        ("generate", llama_folder, file, "def f", "--window", 2, "--max-new-tokens", 5),
        ("bench", "--tokens", 64, "--heads", 1, "--head-dim", 64, "--rounds", 1),
    ):
        assert main([*map(str, command), "--quiet"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert (
            max(
                map(
                    len,
                    out.replace(str(tmp_path.parent), "")
                    .replace(str(own_text.parent.parent), "")
                    .splitlines(),
                )
            )
            < 140
        )
        if command[0] == "learn":
            assert "weighs more than 1% of the model" in out
        if command[0] == "inspect":
            assert "rotation" in out and "mse" in out and "own.txt" in out
    assert KeyCodec.load(file).layers[0].temperature is not None


# An interruption.


def test_cli_learn_goes_on_when_interrupted_and_ends_with_the_same_file(
    llama_folder, own_text, capsys, tmp_path, monkeypatch
):
    whole, file = tmp_path / "whole.safetensors", tmp_path / "codec.safetensors"
    learn = ["learn", str(llama_folder), "--text", str(own_text), "--keys-per-dim", "32"]
    assert main([*learn, "-o", str(whole)]) == 0
    calls = []

    def interrupted(*arguments, real=basis.learn_basis):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(lattice, "learn_basis", interrupted)
    capsys.readouterr()
    scratch = tmp_path / "scratch"
    learn += ["-o", str(file), "--scratch", str(scratch)]
    assert main([*learn, "--json", "--quiet"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("signlattice: interrupted: ")
    assert "codec.safetensors.parts; the same command goes on from there" in err
    assert not file.exists()
    assert [path.name for path in scratch.rglob("layer-*")] == ["layer-0.safetensors"]

    found, _ = run(capsys, *learn)
    assert len(calls) == 2 + 1 + 1  # the other layer, and the null
    assert file.read_bytes() == whole.read_bytes()
    assert list(scratch.iterdir()) == []
    assert found["share"] == pytest.approx(found["bytes"] / found["weight_bytes"])


# Mistakes.


def test_cli_learn_tells_of_an_unknown_model(capsys, tmp_path):
    err = told(capsys, "learn", "no such/model at all", "-o", tmp_path / "x")
    assert "'no such/model at all'" in err and "<owner>/<name>" in err


def test_cli_tells_of_a_missing_codec_before_a_model_is_loaded(capsys, tmp_path):
    missing = tmp_path / "none.safetensors"
    for command in (("measure", "m"), ("evaluate", "m"), ("generate", "m"), ("inspect",)):
        prompt = ["p"] if command[0] == "generate" else []
        assert f"no codec file at {missing}" in told(capsys, *command, missing, *prompt)


def test_cli_measure_tells_of_a_codec_of_another_model(learned, capsys):
    assert "fit one for this model" in told(capsys, "measure", "olmoe-mini", learned)


def test_a_codec_chooses_no_text_and_sends_nothing_to_a_terminal(learned, capsys, tmp_path):
    own = KeyCodec.load(learned)
    file = tmp_path / "codec.safetensors"
    for text in ("/", "c4", str(tmp_path / "pipe"), "\x1b]0;title\x07"):
        replace(own, provenance=own.provenance | {"text": text}).save(file, bits=8)
        for command in ("measure", "evaluate"):
            err = told(capsys, command, MODEL, file)
            assert "name the text to read with --text" in err and "\x1b" not in err
        assert main(["inspect", str(file)]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_a_pipe_is_no_codec(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in told(capsys, "inspect", tmp_path / "pipe")
    assert "name too long" in told(capsys, "inspect", "n" * 5000)


def test_bench_refuses_what_does_not_fit_the_memory(capsys):
    err = told(capsys, "bench", "--device", "cpu", "--tokens", "999999999999")
    assert "--tokens 999999999999: keys and values of" in err and "use fewer" in err


def test_cli_inspect_and_measure_tell_of_a_truncated_codec(learned, capsys, tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes(learned.read_bytes()[:-100])
    assert "not a whole safetensors file" in told(capsys, "inspect", short)
    assert "not a whole safetensors file" in told(capsys, "measure", MODEL, short)


def test_cli_learn_tells_before_work_begins_of_an_output_that_cannot_be_written(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("signlattice.cli.commands._load", lambda options: pytest.fail("too late"))
    file = tmp_path / "file"
    file.touch()
    assert "cannot write to" in told(capsys, "learn", MODEL, "-o", file / "codec")
    assert "is a folder" in told(capsys, "learn", MODEL, "-o", tmp_path)
    assert "is a device" in told(capsys, "learn", MODEL, "-o", "/dev/null")
    with locked(tmp_path / "x.parts"):
        err = told(capsys, "learn", MODEL, "-o", tmp_path / "x")
    assert "another process is at work in" in err and "choose another output" in err
    scratch = ("--scratch", file / "parts")
    assert "cannot write to" in told(capsys, "learn", MODEL, "-o", tmp_path / "x", *scratch)


def test_cli_evaluate_tells_of_a_window_that_packs_nothing(learned, capsys):
    err = told(capsys, "evaluate", MODEL, learned, "--window", 508)
    assert "--window 508 --sinks 4" in err and "512 tokens" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", 1000), "512"),
        (("--revision", "main"), "leave it out"),
        (("--device", "cuda:99"), "use auto or cpu"),
        (("--text", "no such text"), "choose one of corpus"),
    ],
)
def test_cli_measure_tells_what_a_model_cannot_do(learned, capsys, options, message):
    assert message in told(capsys, "measure", MODEL, learned, *options)


def test_cli_generate_tells_of_a_prompt_that_is_none(learned, capsys):
    assert "empty" in told(capsys, "generate", MODEL, learned, "")
    assert "UTF-8" in told(capsys, "generate", MODEL, learned, "\udcff")
    many = ("--max-new-tokens", 600)
    assert "reads 512 in all" in told(capsys, "generate", MODEL, learned, "a", *many)


def test_cli_bench_tells_of_a_head_that_no_kernel_is_made_for(capsys):
    assert "choose one of 16" in told(capsys, "bench", "--head-dim", 100)
    assert "or fewer" in told(capsys, "bench", "--group", 10**6)


def test_cli_measure_tells_of_too_little_memory(learned, capsys, monkeypatch):
    def full(options):
        raise MemoryError

    monkeypatch.setattr("signlattice.cli.commands._load", full)
    assert "lower --batch-size" in told(capsys, "measure", MODEL, learned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("learn", MODEL), "-o/--output"),
        (("learn", MODEL, "-o", "x", "--code", "cube"), "'cube'"),
        (("learn", MODEL, "-o", "x", "--keys-per-dim", 0), "'0': use a whole number, 1 or more"),
        (("evaluate", MODEL, "x", "--values", "int8,int3"), "--values: 'int3': choose among full"),
        (("evaluate", MODEL, "x", "--window", -1), "--window: '-1': use a whole number, 0 or more"),
        (("generate", MODEL, "x", "p", "--top-p", 2), "--top-p: '2': use a number above 0"),
        (("generate", MODEL, "x", "p", "--temperature", "nan"), "'nan': use a number above 0"),
        (("bench", "--tokens", "64,"), "--tokens: '': use a whole number"),
        (("bench", "--device", "tpu"), "'tpu': use auto, cpu, cuda"),
    ],
)
def test_cli_names_a_wrong_value_and_what_would_be_right(capsys, arguments, message):
    assert message in misused(capsys, *arguments)


# The program itself.


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_cli_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    assert f"example:\n  signlattice {command}" in capsys.readouterr().out


def test_cli_arguments_may_be_what_the_library_takes():
    assert set(cli.VALUES) == set(storage.VALUE_FORMATS)
    assert set(cli.SCALES) == set(scales.SCALE_RULES)
    assert cli.DTYPES == ("auto", *full_size.DTYPES)


def test_cli_runs_as_a_module_without_waiting_for_torch():
    code = "import sys, signlattice.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    command = [sys.executable, "-m", "signlattice", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"signlattice {__version__}\n"


def piped(redirection: str, *arguments: object) -> subprocess.CompletedProcess:
    """A command under a redirection of bash; its exit code, and what came through."""
    words = shlex.join([sys.executable, "-m", "signlattice", *map(str, arguments)])
    script = f"set -o pipefail; {words} {redirection}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("inspect",), ("--help",)])
def test_main_takes_a_reader_that_has_read_enough_for_a_success(learned, arguments):
    files = [learned] if arguments == ("inspect",) else []
    done = piped("| true", *arguments, *files)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_main_goes_on_when_nobody_reads_its_progress(llama_folder, own_text, tmp_path):
    file = tmp_path / "codec.safetensors"
    learn = ("learn", llama_folder, "--text", own_text, "--keys-per-dim", 16, "-o", file)
    assert piped("2>&1 >/dev/null | true", *learn).returncode == 0
    assert KeyCodec.load(file).layers


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        (">/dev/full", "signlattice: cannot print to stdout: No space left on device\n"),
        (">&-", "signlattice: stdout is closed: there is nowhere to print a result\n"),
        (">/dev/full 2>&-", ""),
    ],
)
def test_main_fails_in_a_line_where_it_cannot_print(learned, redirection, told):
    done = piped(redirection, "inspect", learned)
    assert (done.returncode, done.stderr) == (1, told)


def test_main_needs_no_stderr(learned):
    done = piped("2>&-", "inspect", learned)
    assert done.returncode == 0 and "lattice" in done.stdout


# How results look.


def test_table_aligns_text_left_and_numbers_right():
    rows = [{"a": "x", "b": 1.0}, {"a": "long", "b": None}, {"a": None, "b": 22.25}]
    assert table(rows, {"a": ("name", ""), "b": ("b", ".1f")}) == [
        "name     b",
        "x      1.0",
        "long     -",
        "-     22.2",
    ]


def test_size_span_and_plain_give_values_as_they_are_shown():
    assert [size(n) for n in (999, 1000, 1.25e6, 2e9)] == ["999 bytes", "1 kB", "1.25 MB", "2 GB"]
    assert (span([0.5, 0.25], ".2f"), span([1.0])) == ("0.25–0.50", "1.000")
    assert plain({1: (float("nan"), 2)}) == {"1": [None, 2]}


def test_cli_defaults_are_those_of_the_library():
    own = cli.parser()
    generate = own.parse_args(["generate", "m", "c", "p"])
    evaluate = own.parse_args(["evaluate", "m", "c"])
    wanted = CacheConfig()
    assert generate.values == wanted.value_format and wanted.value_format in evaluate.values
    for options in (generate, evaluate):
        assert (options.window, options.sinks) == (wanted.window, wanted.sinks)
    assert evaluate.passages == QualityConfig().n_passages
