"""`generate()` does with our cache what it does with transformers' own, in all its ways."""

from __future__ import annotations

import copy

import pytest
import torch
from contract_cases import ALL, ONE, assert_same, generated, ours, read, theirs
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from cache_cases import tiny, tokens
from signlattice.cache.sign_key_cache import SignKeyCache
from signlattice.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

IDS = tokens(2, 26)
MASK = (torch.arange(26) >= torch.tensor([[0], [11]])).long()


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts = []

    def put(self, value):
        self.parts.append(value.tolist())

    def end(self):
        self.parts.append("end")


def with_outputs(model: PreTrainedModel, cache: Cache) -> list:
    out = generated(
        model,
        IDS,
        cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert out.past_key_values is cache
    return [out.sequences, out.scores, out.logits, out.hidden_states]


def continued(model: PreTrainedModel, cache: Cache) -> list:
    first = generated(model, IDS, cache, 4)
    length = cache.get_seq_length()
    question = torch.cat((first, tokens(2, 9, seed=5)), 1)
    return [length, generated(model, question, cache)]


def without_mask_or_ids(model: PreTrainedModel, cache: Cache):
    embeds = model.get_input_embeddings()(IDS)
    return model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(IDS),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
    )


def streamed(model: PreTrainedModel, cache: Cache) -> list:
    streamer = Recorder()
    generated(model, IDS[:1], cache, streamer=streamer)
    return streamer.parts


def stopped(model: PreTrainedModel, cache: Cache):
    halt = StoppingCriteriaList([lambda ids, scores: torch.full((2,), ids.shape[1] >= 29)])
    return generated(model, IDS, cache, 9, stopping_criteria=halt)


def processed(model: PreTrainedModel, cache: Cache):
    forbid = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, ids[0], -torch.inf)])
    return generated(model, IDS, cache, logits_processor=forbid)


def early_end(model: PreTrainedModel, cache: Cache):
    first = int(generated(model, IDS, theirs(model), 2)[0, -1])  # one sequence ends, one goes on
    return generated(model, IDS, cache, eos_token_id=first, pad_token_id=0)


QUICK = {
    "greedy, all outputs": with_outputs,
    "sampling": lambda model, cache: generated(model, IDS, cache, do_sample=True, top_k=0),
    "left padding": lambda model, cache: generated(model, IDS * MASK, cache, attention_mask=MASK),
    "chunks of a prompt": lambda model, cache: generated(model, IDS, cache, prefill_chunk_size=7),
    "one token": lambda model, cache: generated(model, IDS[:, :1], cache),
    "no new token read": lambda model, cache: generated(model, IDS, cache, 1),
    "a conversation": continued,
    "embeddings": without_mask_or_ids,
    "a sequence that ends early": early_end,
}
SLOW = {
    "beams": lambda model, cache: generated(
        model, IDS * MASK, cache, num_beams=3, num_return_sequences=2, attention_mask=MASK
    ),
    "sampled beams": lambda model, cache: generated(model, IDS, cache, num_beams=2, do_sample=True),
    "beams that stop early": lambda model, cache: generated(
        model, IDS, cache, num_beams=2, early_stopping=True, eos_token_id=5
    ),
    "sequences of one prompt": lambda model, cache: generated(
        model, IDS, cache, do_sample=True, num_return_sequences=3
    ),
    "lookup": lambda model, cache: generated(
        model, IDS[:1, :9].repeat(1, 4), cache, 20, prompt_lookup_num_tokens=40
    ),
    "an assistant": lambda model, cache: generated(
        model, IDS[:1], cache, 12, assistant_model=tiny("llama")
    ),
    "a streamer": streamed,
    "a stopping criterion": stopped,
    "a processor of logits": processed,
    "a penalty": lambda model, cache: generated(model, IDS, cache, repetition_penalty=1.4),
}


@ALL
@pytest.mark.parametrize("way", QUICK)
def test_generate_is_that_with_a_dynamic_cache(name, way):
    model = tiny(name)
    # what padding holds, which nobody reads, is zeros with ours and an average in some models
    assert_same(model, lambda cache: QUICK[way](model, cache), goes_on=way != "left padding")


@ONE
@pytest.mark.parametrize("way", SLOW)
def test_generate_in_other_ways_is_that_with_a_dynamic_cache(name, way):
    model = tiny(name)
    assert_same(model, lambda cache: SLOW[way](model, cache))


@ALL
def test_generate_serves_a_prompt_many_times_from_copies(name):
    model = tiny(name)

    def served(cache: Cache) -> list:
        read(model, IDS[:1, :-4], cache)
        many = copy.deepcopy(cache)
        many.batch_repeat_interleave(3)
        return [
            *(generated(model, IDS[:1], copy.deepcopy(cache)) for _ in range(2)),
            generated(model, IDS[:1].repeat(3, 1), many),
        ]

    assert_same(model, served)


@ALL
def test_generate_after_a_reset_is_that_of_a_new_cache(name):
    model = tiny(name)

    def again(cache: Cache):
        generated(model, tokens(3, 20, seed=4), cache)
        cache.reset()
        return generated(model, IDS, cache)

    assert_same(model, again)


def test_generate_of_several_sequences_says_how_to_repeat_the_prompt():
    model = tiny("llama")
    cache = ours(model)
    read(model, IDS[:1, :-1], cache)
    with pytest.raises(InputError, match=r"call batch_repeat_interleave\(3\)"):
        generated(model, IDS[:1], cache, num_return_sequences=3, do_sample=True)
    assert cache.get_seq_length() == 25


def test_generate_makes_a_dynamic_cache_of_its_own_as_before():
    model = tiny("llama")
    with ours(model):
        out = generated(model, IDS, None, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache
    assert not isinstance(out.past_key_values, SignKeyCache)
