"use strict";
(() => {
  /**
   * @typedef {{format: number, loss: number, error: number|null, bytes: number}} Option
   * @typedef {{format: number, gain: number, error: number|null, cost: number, rate: number, noise: boolean}} Step
   *   ``gain``: loss now less loss after it; ``error``: null where that of a score is not known; ``cost``: bytes more
   *   (negative for a step down); ``rate``: gain per MiB; ``noise``: whether the gain is known to be within noise.
   */
  const MIB = 2 ** 20;
  /** Uniform plans of up to this share of a plan's bytes count as plans of its size. */
  const NEARLY_EQUAL = 1.01;

  /** A score as plans are made from it: what is below zero counts as its standard error. */
  const settled = (loss, error) => {
    if (loss === null || loss === undefined) return null;
    return loss < 0 ? (error === null || error === undefined ? Math.abs(loss) : error) : loss;
  };

  /** Decisions of a study: the layers, options and bytes of each. */
  const decisions = (data) => {
    const place = new Map(data.formats.map((format, i) => [format.name, i]));
    const layers = data.decisions.map(() => []);
    data.layers.forEach((layer, i) => layers[layer.row].push(i));
    const kv = Object.entries(data.costs).find(([resource]) => resource.startsWith("kv "))?.[1];
    const bytesOf = (row, format) => {
      if (kv && data.layers[layers[row][0]]?.kind === "kv_cache") {
        const at = kv.formats.indexOf(data.formats[format].name);
        return at < 0 ? null : kv.cost[row][at];
      }
      let total = 0;
      for (const i of layers[row]) {
        const one = data.bytes[i][format];
        if (one === null) return null;
        total += one;
      }
      return total;
    };
    return data.decisions.map((name, row) => {
      const bytes = data.formats.map((_, format) => bytesOf(row, format));
      const loss = data.formats.map(() => null);
      const error = data.formats.map(() => null);
      data.scores?.formats.forEach((format, at) => {
        const here = place.get(format);
        if (here === undefined) return;
        loss[here] = settled(data.scores.loss[row][at], data.scores.error[row][at]);
        error[here] = data.scores.error[row][at] ?? null;
      });
      const options = data.formats
        .map((_, format) => ({ format, loss: loss[format], error: error[format], bytes: bytes[format] }))
        .filter((option) => option.loss !== null && option.bytes !== null)
        .sort((a, b) => a.bytes - b.bytes || a.loss - b.loss);
      return { name, layers: layers[row], bytes, loss, error, options };
    });
  };

  /** Order of formats of each cost table, as columns by the numbers of the study's formats. */
  const tables = (data) =>
    Object.fromEntries(
      Object.entries(data.costs).map(([resource, table]) => {
        const place = new Map(table.formats.map((name, i) => [name, i]));
        return [resource, { ...table, column: data.formats.map((format) => place.get(format.name)) }];
      }),
    );

  /**
   * Open a study for drawing.
   * @param {Object} data what ``mpsearch.views.packed.packed`` returns
   * @param {ArrayBuffer|Uint8Array} [choices] of all plans, as ``mpsearch.views.packed.choices`` returns them
   */
  MP.open = (data, choices) => {
    const { points } = data;
    const count = points.label.length;
    const wide = data.formats.length > 256;
    const length = data.layers.length;
    const made = (buffer) => (wide ? new Uint16Array(buffer) : new Uint8Array(buffer));
    const held = made(new ArrayBuffer(count * length * (wide ? 2 : 1)));
    const loaded = new Uint8Array(count);
    const rows = decisions(data);
    const costs = tables(data);
    const lead = rows.map((row) => row.layers[0]);

    const put = (first, bytes) => {
      const from = bytes instanceof ArrayBuffer ? bytes : bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
      const values = made(from);
      held.set(values, first * length);
      loaded.fill(1, first, first + (length ? values.length / length : count));
    };
    if (choices) put(0, choices);
    else if (!length) loaded.fill(1);

    // Rows of all tables one after the other: sums over thousands of plans read them.
    const flat = (value) => {
      const cells = new Float64Array(rows.length * data.formats.length).fill(NaN);
      rows.forEach((_, i) => data.formats.forEach((_, j) => { cells[i * data.formats.length + j] = value(i, j) ?? NaN; }));
      return cells;
    };
    const cells = { loss: flat((i, j) => rows[i].loss[j]), error: flat((i, j) => rows[i].error[j]), bytes: flat((i, j) => rows[i].bytes[j]) };
    const priced = {};
    const terms = new Float64Array(rows.length);
    const over = (choice, from) => {
      for (let i = 0; i < terms.length; i += 1) terms[i] = from[i * data.formats.length + choice[lead[i]]];
      return MP.sum(terms);
    };

    const cost = (choice, resource = "weights") => {
      const table = costs[resource];
      if (!table) return resource === "weights" ? over(choice, cells.bytes) : null;
      priced[resource] ??= flat((i, j) => table.cost[i][table.column[j]]);
      const total = over(choice, priced[resource]);
      return total === null ? null : table.fixed + total;
    };
    const total = (choice, of) => (data.scores ? over(choice, cells[of]) : null);

    /** @returns {Step|null} */
    const step = (choice, row, up) => {
      const { options, bytes, loss, error } = rows[row];
      const now = choice[lead[row]];
      if (loss[now] === null || bytes[now] === null) return null;
      const beyond = options.filter((option) => (up ? option.bytes > bytes[now] : option.bytes < bytes[now]));
      if (!beyond.length) return null;
      const edge = (up ? beyond[0] : beyond[beyond.length - 1]).bytes;
      const next = beyond.find((option) => option.bytes === edge);
      const gain = loss[now] - next.loss;
      const doubt = error[now] === null || next.error === null ? null : Math.hypot(error[now], next.error);
      const change = next.bytes - bytes[now];
      return {
        format: next.format, gain, error: doubt, cost: change, rate: gain / (change / MIB),
        noise: doubt !== null && Math.abs(gain) < 1.96 * doubt,
      };
    };

    const study = {
      data, count, length, decisions: rows, lead,
      /** Formats of a plan: typed array of the layers; null while not loaded. @param {number} i */
      choice: (i) => (i === null || i === undefined || !loaded[i] ? null : held.subarray(i * length, (i + 1) * length)),
      /** Take formats of plans. @param {number} first number of the first plan @param {ArrayBuffer|Uint8Array} bytes */
      put,
      /** Whether the formats of a plan are not loaded. @param {number} i */
      missing: (i) => !loaded[i],
      size: (i, resource = "weights") => points.cost[resource]?.[i] ?? null,
      bits: (i) => (data.weights && study.size(i) !== null ? (8 * study.size(i)) / data.weights : null),
      /** Measured loss; null where not measured. */
      loss: (i) => points.loss[i],
      /** Predicted loss as stored; null where none. */
      forecast: (i) => points.predicted[i],
      /** Predicted loss of any choice: exact sum over decisions; null where one is not scored. */
      predicted: (choice) => total(choice, "loss"),
      /** Upper limit of its standard error. */
      doubt: (choice) => total(choice, "error"),
      /** Bytes of the whole model, what is not decided included. */
      bytes: (choice) => cost(choice),
      cost,
      stepUp: (choice, row) => step(choice, row, true),
      stepDown: (choice, row) => step(choice, row, false),
      /** Rank of the next step up among those of all decisions by gain per MiB, 1 is best; null without a step. */
      rank: (choice, row) => {
        const own = step(choice, row, true);
        if (!own) return null;
        return 1 + rows.filter((_, i) => i !== row && (step(choice, i, true)?.rate ?? -Infinity) > own.rate).length;
      },
      /** How many decisions have a next step up. */
      steps: (choice) => rows.filter((_, i) => step(choice, i, true)).length,
      /**
       * The measured uniform plan of the least loss among those that are at most a hair larger than so many bytes.
       * @param {number|null} size @returns {number|null}
       */
      rivalOf: (size) => {
        if (size === null) return null;
        const found = points.group.map((_, i) => i).filter((i) => points.group[i] === "uniform" && points.loss[i] !== null
          && study.size(i) !== null && study.size(i) <= NEARLY_EQUAL * size);
        found.sort((a, b) => points.loss[a] - points.loss[b] || study.size(a) - study.size(b));
        return found[0] ?? null;
      },
      /** Its number for a stored plan, as the other figures have it. @param {number|null} i */
      rival: (i) => (i === null ? null : points.rival === undefined ? study.rivalOf(study.size(i)) : points.rival[i]),
      /** Name of a format. */
      format: (number) => data.formats[number].name,
      /** Number of the plan for the study's own budgets; the first one where none is; null without plans. */
      chosen: count ? Math.max(0, points.group.indexOf("chosen")) : null,
    };
    return study;
  };

  /** Spearman's rank correlation of pairs; null where it is not defined. Equal values share their mean rank. */
  MP.spearman = (left, right) => {
    const ranks = (values) => {
      const order = values.map((_, i) => i).sort((a, b) => values[a] - values[b]);
      const found = new Float64Array(values.length);
      for (let i = 0; i < order.length; ) {
        let j = i;
        while (j < order.length && values[order[j]] === values[order[i]]) j += 1;
        for (let k = i; k < j; k += 1) found[order[k]] = (i + j - 1) / 2;
        i = j;
      }
      return found;
    };
    const n = left.length;
    if (n < 4) return null;
    const [a, b] = [ranks(left), ranks(right)];
    const middle = (n - 1) / 2;
    let [ab, aa, bb] = [0, 0, 0];
    for (let i = 0; i < n; i += 1) {
      ab += (a[i] - middle) * (b[i] - middle);
      aa += (a[i] - middle) ** 2;
      bb += (b[i] - middle) ** 2;
    }
    return aa && bb ? ab / Math.sqrt(aa * bb) : null;
  };

  /** Interval of 95 % of a rank correlation of n pairs, by Fisher's transform (Bonett and Wright's error). */
  MP.spearmanInterval = (value, n) => {
    if (value === null || n < 4) return null;
    const error = Math.sqrt((1 + value ** 2 / 2) / (n - 3));
    const middle = Math.atanh(Math.min(Math.max(value, -0.999999), 0.999999));
    return [Math.tanh(middle - 1.96 * error), Math.tanh(middle + 1.96 * error)];
  };
})();
