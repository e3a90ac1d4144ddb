// What a KV cache weighs: the arithmetic of signlattice/memory.py, and a form around it.

const FULL_PRECISION_BITS = 16;

// ---- The arithmetic. `s` holds the numbers of a shape, a format and a workload by name, with null
// ---- for what is left out; it is the same as memory.py, and the tests hold the two together.

const padded = (bits, word) => Math.ceil(bits / word) * word;

export function parts(s) {
  const heads = s.n_layers * s.n_kv_heads;
  const valueDim = s.value_head_dim ?? s.head_dim;
  const cached = Math.min(s.seq_len, s.sliding_window ?? s.seq_len);
  const full = Math.min(cached, s.window + s.sinks);
  const coded = heads * s.batch * (cached - full);
  const groups = s.value_group === null ? 1 : Math.ceil(valueDim / s.value_group);
  const table =
    s.rotation_bits * s.head_dim ** 2 + s.static_mean_bits * s.head_dim + s.temperature_bits;
  return {
    vectors: heads * s.batch * cached,
    valueDim,
    keyFull: heads * s.batch * full * FULL_PRECISION_BITS * s.head_dim,
    valueFull: heads * s.batch * full * FULL_PRECISION_BITS * valueDim,
    keyCodes: coded * padded(s.key_bits * s.head_dim, s.word_bits),
    keyMetadata: coded * (s.key_scale_bits + s.mean_bits),
    valueCodes: coded * padded(s.value_bits * valueDim, s.word_bits),
    valueScales: coded * groups * s.value_scale_bits,
    tables: heads * table,
  };
}

export function weigh(s) {
  const p = parts(s);
  const key = p.keyFull + p.keyCodes + p.keyMetadata + p.tables;
  const value = p.valueFull + p.valueCodes + p.valueScales;
  const nKey = p.vectors * s.head_dim;
  const nValue = p.vectors * p.valueDim;
  const fullBits = FULL_PRECISION_BITS * (nKey + nValue);
  return {
    bytes: Math.ceil((key + value) / 8),
    fullBytes: Math.ceil(fullBits / 8),
    reduction: fullBits / (key + value),
    keyBits: key / nKey,
    valueBits: value / nValue,
    averageBits: (key + value) / (nKey + nValue),
    bits: key + value,
    parts: p,
  };
}

/** Shortest length at which the cache weighs as much as the weights; null if windows bound it. */
export function crossover(s, weightBytes) {
  const reaches = (length) => weigh({ ...s, seq_len: length }).bits >= 8 * weightBytes;
  if (s.sliding_window !== null && !reaches(s.sliding_window)) return null;
  let high = 1;
  while (!reaches(high)) high *= 2;
  let low = Math.floor(high / 2);
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (reaches(middle)) high = middle;
    else low = middle;
  }
  return high;
}

// ---- What is typed, and how it is told.

/** The number that a text stands for in a field, null if it may be left out; throws what is wrong. */
export function read(field, text) {
  const trimmed = text.trim();
  if (trimmed === "" && field.optional) return null;
  const value = Number(trimmed);
  const kind = field.whole ? "a whole number" : "a number";
  const range = `${kind} from ${field.least} to ${field.most.toLocaleString("en")}`;
  const wrong =
    trimmed === "" || !Number.isFinite(value) || (field.whole && !Number.isInteger(value));
  if (wrong || value < field.least || value > field.most) {
    const given = trimmed === "" ? "nothing" : `“${trimmed}”`;
    throw new RangeError(`${field.label}: ${given} is not ${range}`);
  }
  return value;
}

export function inBytes(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let place = 0;
  while (bytes >= 1024 && place < units.length - 1) {
    bytes /= 1024;
    place += 1;
  }
  const digits = place === 0 || bytes >= 100 ? 0 : bytes >= 10 ? 1 : 2;
  return `${bytes.toFixed(digits)} ${units[place]}`;
}

const tokens = (count) => (count === null ? "never" : `${count.toLocaleString("en")} tokens`);

// ---- The form.

const PARTS = [
  ["keyCodes", "key codes", "#0072B2"],
  ["keyMetadata", "scales and means of keys", "#56B4E9"],
  ["valueCodes", "value codes", "#D55E00"],
  ["valueScales", "scales of values", "#E69F00"],
  ["full", "tokens in 16 bits", "#CC79A7"],
  ["tables", "tables of heads", "#009E73"],
];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function render({ model, el }) {
  const fields = model.get("fields");
  const scope = `calculator-${Math.random().toString(36).slice(2, 8)}`;
  const inputs = new Map();
  const ranges = new Map();
  const root = element("div", { class: "kv-calculator" });

  const chooser = (label, choices) => {
    const id = `${scope}-${label.replaceAll(" ", "-")}`;
    const select = element("select", { id });
    for (const name of Object.keys(choices)) select.append(element("option", { value: name }, name));
    select.append(element("option", { value: "" }, "another, as set below"));
    select.addEventListener("change", () => {
      if (choices[select.value]) fill(choices[select.value]);
      update();
    });
    root.append(element("div", { class: "kv-choice" },
      element("label", { for: id }, label), select));
    return select;
  };
  const shapes = chooser("model", model.get("shapes"));
  const formats = chooser("cache format", model.get("formats"));
  const choosers = new Map([["shape", shapes], ["format", formats]]);

  for (const group of model.get("groups")) {
    const box = element("fieldset", {}, element("legend", {}, group.title));
    for (const field of fields.filter((f) => f.group === group.name)) box.append(row(field));
    const held = group.more
      ? element("details", {}, element("summary", {}, group.more), box)
      : box;
    root.append(held);
  }

  function row(field) {
    const id = `${scope}-${field.name}`;
    const input = element("input", {
      id, type: "text", inputmode: field.whole ? "numeric" : "decimal", autocomplete: "off",
      "aria-describedby": `${id}-unit`, placeholder: field.optional ?? "", "data-name": field.name,
    });
    input.addEventListener("input", () => { release(field); update(); });
    inputs.set(field.name, input);
    const line = element("div", { class: "kv-field" },
      element("label", { for: id }, field.label), input,
      element("span", { id: `${id}-unit`, class: "kv-unit" }, field.unit));
    if (field.range) line.append(slider(field));
    return line;
  }

  function slider(field) {
    const [low, high, step] = field.range;
    const range = element("input", {
      type: "range", min: low, max: high, step, "aria-label": `${field.label}, by slider`,
      "data-name": field.name,
    });
    range.addEventListener("input", () => {
      const value = field.logarithmic ? Math.round(2 ** Number(range.value)) : Number(range.value);
      inputs.get(field.name).value = String(value);
      release(field);
      update();
    });
    ranges.set(field.name, range);
    return range;
  }

  // A number changed by hand belongs to no named model or format any more.
  function release(field) {
    const select = choosers.get(field.of);
    if (select) select.value = "";
  }

  function fill(settings) {
    for (const [name, value] of Object.entries(settings)) {
      const input = inputs.get(name);
      if (input) input.value = value === null ? "" : String(value);
    }
  }

  const told = element("p", { class: "kv-told", role: "status", "aria-live": "polite" });
  const bars = element("div", { class: "kv-bars" });
  const facts = element("dl", { class: "kv-facts" });
  const out = element("div", { class: "kv-result" }, bars, facts);
  root.append(told, out);
  el.append(root);

  function settings() {
    const found = {};
    let first = null;
    for (const field of fields) {
      const input = inputs.get(field.name);
      try {
        found[field.name] = read(field, input.value);
        input.removeAttribute("aria-invalid");
      } catch (error) {
        input.setAttribute("aria-invalid", "true");
        first ??= error.message;
      }
    }
    return [found, first];
  }

  function update() {
    const [s, wrong] = settings();
    out.hidden = wrong !== null;
    root.classList.toggle("kv-wrong", wrong !== null);
    if (wrong !== null) {
      told.textContent = `${wrong}.`;
      return;
    }
    for (const [name, range] of ranges) {
      const field = fields.find((f) => f.name === name);
      range.value = field.logarithmic ? Math.log2(s[name]) : s[name];
      range.setAttribute("aria-valuetext", `${s[name].toLocaleString("en")} ${field.unit}`);
    }
    show(s, weigh(s));
    model.set("settings", s);
    try {
      model.save_changes();
    } catch {
      // a built page has no kernel to tell
    }
  }

  function show(s, w) {
    told.textContent =
      `${inBytes(w.bytes)} instead of ${inBytes(w.fullBytes)}: ` +
      `${w.reduction.toFixed(2)} times smaller, ${w.averageBits.toFixed(2)} bits per coordinate.`;
    told.dataset.bytes = w.bytes;
    told.dataset.fullBytes = w.fullBytes;
    const full = w.fullBytes * 8;
    const scale = 100 / Math.max(full, w.bits);
    const p = { ...w.parts, full: w.parts.keyFull + w.parts.valueFull };
    const shown = PARTS.filter(([name]) => p[name] > 0);
    bars.replaceChildren(
      bar("16 bits", inBytes(w.fullBytes), [["", full * scale, "#767676"]]),
      bar("as coded", inBytes(w.bytes), shown.map(([n, l, c]) => [l, p[n] * scale, c])),
      element("ul", { class: "kv-key" }, ...shown.map(([name, label, colour]) => {
        const swatch = element("span", { class: "kv-swatch", style: `background:${colour}` });
        return element("li", {}, swatch, `${label}: ${inBytes(p[name] / 8)}`);
      })),
    );
    const weights = s.weights * 2 ** 30;
    const sixteen = {
      ...s, key_bits: 16, value_bits: 16, key_scale_bits: 0, value_scale_bits: 0, mean_bits: 0,
      static_mean_bits: 0, rotation_bits: 0, temperature_bits: 0, window: 0, sinks: 0, word_bits: 8,
    };
    const rows = [
      ["keys", `${w.keyBits.toFixed(3)} bits per coordinate`],
      ["values", `${w.valueBits.toFixed(3)} bits per coordinate`],
      ["a token", inBytes(w.bytes / (s.batch * s.seq_len))],
      ["cache beside the weights", `${((100 * w.bytes) / weights).toFixed(1)} %`],
      ["outgrows the weights, 16 bits", tokens(crossover(sixteen, weights))],
      ["outgrows the weights, as coded", tokens(crossover(s, weights))],
    ];
    facts.replaceChildren(...rows.flatMap(([name, value]) => [
      element("dt", {}, name), element("dd", {}, value),
    ]));
  }

  function bar(name, size, pieces) {
    const track = element("div", { class: "kv-track", "aria-hidden": "true" });
    for (const [label, width, colour] of pieces) {
      track.append(element("span", { title: label, style: `width:${width}%;background:${colour}` }));
    }
    return element("div", { class: "kv-bar" }, element("span", {}, `${name}: ${size}`), track);
  }

  fill(model.get("settings"));
  shapes.value = model.get("shape_name");
  formats.value = model.get("format_name");
  update();
}

export default { render };
