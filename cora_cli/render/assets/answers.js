// Shows packed answers: a list of prompts on the left, the chosen one with its reference and every run's answer on the right.
// Every text from a file reaches the page through `textContent`, so it can only ever be text.
"use strict";
(() => {
  const DIFF_LIMIT = 1_500_000; // cells of the table of a longest common subsequence
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  // Control characters and marks that turn the direction of text become visible signs.
  const visible = (text) =>
    text.replace(
      /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
      (sign) => `\u27e8U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`,
    );
  const words = (text) => text.match(/[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu) || [];

  // Which words of `ours` are part of a longest common subsequence with `theirs`; null where the texts are too long.
  const common = (ours, theirs) => {
    if (ours.length * theirs.length > DIFF_LIMIT) return null;
    const width = theirs.length + 1;
    const table = new Uint16Array((ours.length + 1) * width);
    for (let i = ours.length - 1; i >= 0; i--)
      for (let j = theirs.length - 1; j >= 0; j--)
        table[i * width + j] =
          ours[i] === theirs[j]
            ? table[(i + 1) * width + j + 1] + 1
            : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    const found = new Set();
    for (let i = 0, j = 0; i < ours.length && j < theirs.length; ) {
      if (ours[i] === theirs[j]) found.add(i++), j++;
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
      else j++;
    }
    return found;
  };
  const marked = (text, other) => {
    const block = element("pre", { dir: "auto" });
    const ours = words(text);
    const isSpace = (word) => /^\s+$/.test(word);
    const places = ours.map((_, place) => place).filter((place) => !isSpace(ours[place]));
    const found = other === null ? null : common(places.map((place) => ours[place]), words(other).filter((word) => !isSpace(word)));
    const same = found && new Set([...found].map((number) => places[number]));
    if (same === null || text === other) {
      block.textContent = visible(text);
      return block;
    }
    let run = "";
    let isSame = true;
    const flush = () => {
      if (run) block.append(isSame ? run : element("mark", { textContent: run }));
      run = "";
    };
    ours.forEach((word, place) => {
      // Space between two words that are marked is marked with them.
      const isEdge = place === 0 || place === ours.length - 1;
      const now = isSpace(word) ? isEdge || same.has(place - 1) || same.has(place + 1) : same.has(place);
      if (now !== isSame) flush();
      isSame = now;
      run += visible(word);
    });
    flush();
    return block;
  };

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  };

  const start = async (root) => {
    const key = root.id;
    const status = root.querySelector(".status");
    let data;
    try {
      data = await unpack(root.querySelector("script").textContent);
    } catch {
      status.textContent = "This browser cannot open the packed answers; use one from 2023 or later.";
      return;
    }
    const { runs, measures, prompts } = data;
    const lower = new Set(data.lower);
    const all = prompts.map((_, index) => index);
    const spreadOf = (index, place) => {
      const scores = prompts[index][2].map((answer) => answer[1][place]).filter((score) => score !== null);
      return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : -1;
    };
    // What tells a prompt from its neighbours: templates begin and end all of them alike.
    const ending = prompts.slice(1).reduce((length, [text]) => {
      const first = prompts[0][0];
      let same = 0;
      while (same < length && text.at(-1 - same) === first.at(-1 - same)) same += 1;
      return same;
    }, prompts.length > 1 ? prompts[0][0].length : 0);
    const ownWords = (index) => {
      const text = prompts[index][0].slice(0, prompts[index][0].length - ending);
      const shared = [index - 1, index + 1].map((other) => {
        const theirs = prompts[other]?.[0] ?? "";
        let length = 0;
        while (length < text.length && text[length] === theirs[length]) length += 1;
        return length;
      });
      const start = text.lastIndexOf("\n", Math.max(...shared)) + 1;
      return (text.slice(start).trim() || text).slice(0, 90);
    };
    const differs = (index) => new Set(prompts[index][2].map((answer) => answer[0])).size > 1;
    const option = (value, text) => element("option", { value: String(value), textContent: visible(text) });
    const choose = (label, ...options) => {
      const select = element("select", {}, ...options);
      return [select, element("label", {}, label, select)];
    };
    const names = runs.map((run, place) => option(place, run));
    const [measure, measureLabel] = choose("score", ...measures.map((name, place) => option(place, name)));
    const [sort, sortLabel] = choose(
      "sort by",
      option("order", "order of the data"),
      ...(runs.length > 1 ? [option("worse", "largest regression"), option("pair", "difference of two runs"), option("spread", "largest difference of all runs")] : []),
      option("worst", "lowest mean score"),
      option("best", "highest mean score"),
    );
    const [first, firstLabel] = choose("run", ...names);
    const [second, secondLabel] = choose("compared with", ...names.map((name) => name.cloneNode(true)));
    if (runs.length > 1) first.value = "1";
    const comparesTwo = () => sort.value === "pair" || sort.value === "worse";
    const [filter, filterLabel] = choose(
      "show",
      option("all", "all prompts"),
      option("differ", "where answers differ"),
      option("equal", "where all answers are equal"),
      option("noted", "with failed programs"),
    );
    const [against, againstLabel] = choose("mark differences from", option("reference", "the reference"), ...names.map((name) => name.cloneNode(true)), option("none", "nothing"));
    const search = element("input", { type: "search", placeholder: "words in prompt or answers" });
    const searchLabel = element("label", {}, "search", search);
    const list = element("ol", { className: "prompts" });
    const detail = element("article", { className: "shown", tabIndex: -1 });
    const controls = element("form", { className: "controls" }, searchLabel, filterLabel, measureLabel, sortLabel, firstLabel, secondLabel, againstLabel);
    controls.addEventListener("submit", (event) => event.preventDefault());
    root.append(controls, element("div", { className: "browser" }, list, detail));
    let order = all;
    let current = 0;
    let drawn = 0;

    // Two runs that are compared come first, so that they stand side by side.
    const inOrder = (answers) => {
      const all = answers.map((answer, run) => [answer, run]);
      const two = comparesTwo() ? [...new Set([Number(first.value), Number(second.value)])] : [];
      return [...two.map((run) => all[run]), ...all.filter(([, run]) => !two.includes(run))];
    };
    const scoreText = (score) => (score === null ? "\u2013" : score.toFixed(3));
    const step = (name, by) => {
      const index = order[order.indexOf(current) + by];
      const button = element("button", { type: "button", className: "step", textContent: name, disabled: index === undefined });
      button.addEventListener("click", () => show(index));
      return button;
    };
    const draw = () => {
      const [prompt, reference, answers] = prompts[current];
      const place = Number(measure.value);
      const link = element("a", { href: `#${key}-${current + 1}`, textContent: `Prompt ${current + 1}` });
      const target = against.value === "none" ? null : against.value === "reference" ? reference : answers[Number(against.value)][0];
      const panel = (name, block, ...rest) => element("section", {}, element("h4", { textContent: visible(name), dir: "auto" }), block, ...rest);
      const scored = answers.map((answer) => answer[1][place]).filter((score) => score !== null && score !== undefined);
      const best = scored.length ? (lower.has(measures[place]) ? Math.min(...scored) : Math.max(...scored)) : null;
      detail.replaceChildren(
        element("h3", {}, step("previous", -1), link, element("small", { textContent: `${order.indexOf(current) + 1} of ${order.length}` }), step("next", 1)),
        panel("prompt", marked(prompt, null)),
        panel("reference", marked(reference, against.value === "reference" ? null : target)),
        element(
          "div",
          { className: "side" },
          ...inOrder(answers).map(([[text, scores, notes], run]) => {
            const chips = measures.map((name, at) => {
              const isBest = at === place && scores[at] !== null && scores[at] === best && new Set(scored).size > 1;
              return element("span", { className: isBest ? "chip best" : at === place ? "chip chosen" : "chip", textContent: `${name} ${scoreText(scores[at])}` });
            });
            const block = text === "" ? element("pre", { className: "empty", textContent: "(empty answer)" }) : marked(text, String(run) === against.value ? null : target);
            return panel(runs[run], block, element("p", { className: "chips" }, ...chips), ...notes.map((note) => element("p", { className: "remark", textContent: visible(note), dir: "auto" })));
          }),
        ),
      );
      list.querySelectorAll("[aria-current]").forEach((button) => button.removeAttribute("aria-current"));
      const button = list.querySelector(`[data-index="${current}"]`);
      if (button) {
        button.setAttribute("aria-current", "true");
        const item = button.parentElement;
        if (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = item.offsetTop - list.clientHeight / 2;
      }
    };
    const more = (upTo) => {
      // The list grows as it is scrolled: thousands of entries at once would be slow.
      const place = Number(measure.value);
      for (; drawn < Math.min(order.length, upTo); drawn++) {
        const index = order[drawn];
        const each = prompts[index][2].map((answer) => answer[1][place] ?? null);
        const [one, other] = [each[Number(first.value)], each[Number(second.value)]];
        const difference = one === null || other === null ? "\u2013" : `${one < other ? "\u2212" : "+"}${Math.abs(one - other).toFixed(3)}`;
        const scores = comparesTwo() ? `${difference} (${scoreText(one)}, ${scoreText(other)})` : each.map(scoreText).join(" \u00b7 ");
        const button = element("button", { type: "button" }, element("b", { textContent: `${index + 1} ` }), element("span", { textContent: visible(ownWords(index)), dir: "auto" }), element("small", { textContent: scores, title: comparesTwo() ? "difference (run, compared with)" : runs.map(visible).join(" \u00b7 ") }));
        button.dataset.index = String(index);
        list.append(element("li", {}, button));
      }
    };
    const show = (index, moved = true) => {
      current = index;
      more(order.indexOf(index) + 30);
      draw();
      if (moved) history.replaceState(null, "", `#${key}-${index + 1}`);
    };
    const update = () => {
      const place = Number(measure.value);
      const wanted = search.value.trim().toLowerCase();
      const has = (text) => text.toLowerCase().includes(wanted);
      const failed = (index) => prompts[index][2].some((answer) => answer[2].some((note) => /^program: (?!passed)/.test(note)));
      order = all.filter(
        (index) =>
          (!wanted || has(prompts[index][0]) || has(prompts[index][1]) || prompts[index][2].some((answer) => has(answer[0]))) &&
          (filter.value === "all" || (filter.value === "noted" ? failed(index) : differs(index) === (filter.value === "differ"))),
      );
      const mean = (index) => {
        const scores = prompts[index][2].map((answer) => answer[1][place]).filter((score) => score !== null && score !== undefined);
        return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : 0;
      };
      const pair = (index) => {
        const [one, other] = [first, second].map((select) => prompts[index][2][Number(select.value)][1][place]);
        return one === null || other === null ? -1 : Math.abs(one - other);
      };
      // Below zero where the run scores worse than the one it is compared with; last where a score is lacking.
      const worse = (index) => {
        const [one, other] = [first, second].map((select) => prompts[index][2][Number(select.value)][1][place]);
        return one === null || other === null ? Infinity : lower.has(measures[place]) ? other - one : one - other;
      };
      const keys = { worse, spread: (index) => -spreadOf(index, place), pair: (index) => -pair(index), worst: mean, best: (index) => -mean(index) };
      if (keys[sort.value]) {
        const values = new Map(order.map((index) => [index, keys[sort.value](index)]));
        order.sort((a, b) => (values.get(a) < values.get(b) ? -1 : values.get(a) > values.get(b) ? 1 : a - b));
      }
      firstLabel.hidden = secondLabel.hidden = !comparesTwo();
      drawn = 0;
      list.replaceChildren();
      const cut = data.total > prompts.length ? `, the first ${prompts.length} of ${data.total}` : "";
      status.replaceChildren(
        `${order.length} of ${prompts.length} prompts${cut}.`,
        element("span", { className: "keys", textContent: " Keys: j and k go to the next and the previous prompt, / searches." }),
      );
      if (order.length === 0) {
        detail.replaceChildren(element("p", { textContent: "No prompt has all of this." }));
        return;
      }
      show(order.includes(current) ? current : order[0], false);
    };
    const follow = () => {
      const found = location.hash.match(new RegExp(`^#${key}-(\\d+)$`));
      const index = found ? Number(found[1]) - 1 : -1;
      if (!prompts[index]) return;
      if (!order.includes(index)) {
        search.value = "";
        filter.value = "all";
        update();
      }
      show(index, false);
      root.scrollIntoView();
    };
    list.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) show(Number(button.dataset.index));
    });
    list.addEventListener("scroll", () => {
      if (list.scrollTop + list.clientHeight * 2 > list.scrollHeight) more(drawn + 50);
    });
    search.addEventListener("input", update);
    filter.addEventListener("change", update);
    // Another order begins with its first prompt.
    [measure, sort, first, second].forEach((select) =>
      select.addEventListener("change", () => {
        update();
        if (order.length) show(order[0]);
        list.scrollTop = 0;
      }),
    );
    against.addEventListener("change", () => order.length && draw());
    root.addEventListener("keydown", (event) => event.key === "Escape" && event.target === search && (search.blur(), detail.focus({ preventScroll: true })));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      const box = root.getBoundingClientRect();
      if (box.bottom < 0 || box.top > innerHeight) return;
      const by = { j: 1, k: -1 }[event.key];
      if (by && order.length) show(order[Math.min(Math.max(order.indexOf(current) + by, 0), order.length - 1)]);
      else if (event.key === "/") {
        event.preventDefault();
        search.focus();
      }
    });
    addEventListener("hashchange", follow);
    update();
    follow();
    root.dataset.ready = "true";
  };
  document.querySelectorAll(".answers").forEach(start);
})();
