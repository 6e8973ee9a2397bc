"""Code tasks on strings: characters, words, ciphers, checks, and parsing of small notations.

Texts in the assertions are ASCII, so that no result depends on Unicode tables.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.functions import Task, present

TEXT_NAMES = ("text", "s", "sentence", "line", "string")
WORDS = (
    "apple", "river", "Moon", "level", "tree", "Anna", "code", "window", "blue", "noon", "Garden", "light", "to", "Paris", "radar", "kayak",
    "seven", "Oslo", "bread", "idea", "echo", "lamp",
)  # fmt: skip
PHRASES = (
    "Room 101, Door 7",
    "It's 5 o'clock, Tom!",
    "A1 b2 C3!",
    "Mississippi 1849",
    "Soup & Rice: 12.50",
    "May 3rd, 10 am",
    "Type X, size S?",
    "No. 8, Elm Road",
)


def _negated(condition: str) -> str:
    return f"not ({condition})" if " " in condition else f"not {condition}"


def _sentences(dice: Dice) -> list[tuple[str]]:
    return [(" ".join(dice.sample(WORDS, dice.between(4, 6))),), (" ".join(dice.sample(WORDS, 3)),)]


# (plural noun, condition on the character c)
CHARACTERS = (
    ("vowels", "c.lower() in 'aeiou'"), ("consonants", "c.isalpha() and c.lower() not in 'aeiou'"), ("digits", "c.isdigit()"),
    ("upper case letters", "c.isupper()"), ("lower case letters", "c.islower()"), ("spaces", "c == ' '"), ("letters", "c.isalpha()"),
    ("punctuation marks (neither letters, digits nor spaces)", "not (c.isalnum() or c == ' ')"), ("occurrences of the letter {k}", "c == '{k}'"),
    ("letters after {k} in the alphabet", "c.lower() > '{k}' and c.isalpha()"),
)  # fmt: skip


def characters(dice: Dice) -> Draft:
    """Count, keep, drop, mask or locate a class of characters."""
    k = dice.choice("aeoms")
    variation, test = dice.choice(CHARACTERS)
    noun, condition = variation.format(k=k), test.format(k=k)
    s = dice.choice(TEXT_NAMES)
    mask = dice.choice("*#_-")
    name, does, body, bug = dice.choice((
        ("count", f"counts the {noun} in {s}", f"return sum(1 for c in {s} if {condition})", ("sum(1", "sum(2")),
        ("keep", f"returns only the {noun} of {s}, as a string", f"return ''.join(c for c in {s} if {condition})", ("if ", "if not ")),
        ("remove", f"removes all {noun} from {s}", f"return ''.join(c for c in {s} if {_negated(condition)})", ("if not ", "if ")),
        ("mask", f"replaces all {noun} in {s} by '{mask}'", f"return ''.join('{mask}' if {condition} else c for c in {s})", None),
        ("find", f"returns the positions of all {noun} in {s}", f"return [i for i, c in enumerate({s}) if {condition}]", ("[i for", "[c for")),
        ("has", f"checks whether {s} contains any {noun}", f"return any({condition} for c in {s})", ("any(", "all(")),
        ("last", f"returns the last one of the {noun} in {s}, or None if there are none",
         f"for c in reversed({s}):\n    if {condition}:\n        return c\nreturn None", ("reversed", "list")),
    ))  # fmt: skip
    function = name + dice.choice(("_chars", "_characters", f"_in_{s}"))
    cases = [(phrase,) for phrase in dice.sample(PHRASES, 2)] + [("",)]
    return present(dice, Task(f"characters {name} {variation}", function, s, does, body, cases, bug=bug))


WORD_CONDITIONS = (
    ("with more than {k} letters", "len(w) > {k}"), ("with at most {k} letters", "len(w) <= {k}"), ("that start with a vowel", "w[0].lower() in 'aeiou'"),
    ("that start with a capital letter", "w[0].isupper()"), ("that read the same backwards, ignoring case", "w.lower() == w.lower()[::-1]"),
    ("that contain the letter {c}", "'{c}' in w"), ("that end with the letter {c}", "w.endswith('{c}')"), ("with an even number of letters", "len(w) % 2 == 0"),
    ("that have a double letter", "any(a == b for a, b in zip(w, w[1:]))"),
)  # fmt: skip
WORD_RESULTS = (
    ("returns a list of the words of {s} {such}", "[w for w in {s}.split() if {condition}]"),
    ("counts the words of {s} {such}", "sum(1 for w in {s}.split() if {condition})"),
    ("returns the words of {s} {such}, in upper case and joined by '{j}'", "'{j}'.join(w.upper() for w in {s}.split() if {condition})"),
    ("returns {s} without the words {such}", "' '.join(w for w in {s}.split() if {negated})"),
    ("reverses the letters of those words of {s} {such}, and leaves the others as they are",
     "' '.join(w[::-1] if {condition} else w for w in {s}.split())"),
    ("returns a dictionary from each word of {s} {such} to its length", "{{w: len(w) for w in {s}.split() if {condition}}}"),
    ("returns the longest of the words of {s} {such}, or an empty string if there is none",
     "max((w for w in {s}.split() if {condition}), key=len, default='')"),
)  # fmt: skip


def words(dice: Dice) -> Draft:
    """Filter the words of a sentence and do something with them."""
    such, condition = dice.choice(WORD_CONDITIONS)
    does, expression = dice.choice(WORD_RESULTS)
    s, constants = dice.choice(TEXT_NAMES), {"k": dice.between(3, 5), "c": dice.choice("aeor")}
    key = f"words {such}|{does}"
    such, condition = such.format(**constants), condition.format(**constants)
    values = {"s": s, "such": such, "condition": condition, "negated": _negated(condition), "j": dice.choice("-+/,")}
    name = dice.choice(("select", "process", "handle", "filter", "extract")) + "_words"
    bug = (condition, _negated(condition)) if dice.chance(0.4) else None
    return present(
        dice, Task(key, name, s, does.format(**values), "return " + expression.format(**values), _sentences(dice), bug=bug)
    )


def transform(dice: Dice) -> Draft:
    """Transform complete strings: ciphers, spellings, runs, wrapping, checks."""
    s, k = dice.choice(TEXT_NAMES), dice.between(2, 9)
    j, fill = dice.choice(("-", "_", ".", "/")), dice.choice("*.0-")
    upper = dice.chance(0.5)
    variation, name, does, body = dice.choice((
        ("caesar", "shift_letters", f"shifts every lower case letter of {s} by {k} places in the alphabet (z is followed by a) and keeps the rest",
         f"result = ''\nfor c in {s}:\n    if 'a' <= c <= 'z':\n        c = chr((ord(c) - ord('a') + {k}) % 26 + ord('a'))\n    result += c\nreturn result"),
        ("palindrome", "is_palindrome", f"checks whether {s} reads the same backwards, ignoring case and everything but letters",
         f"letters = [c.lower() for c in {s} if c.isalpha()]\nreturn letters == letters[::-1]"),
        ("snake", "to_words", f"puts '{j}' before every upper case letter of {s} except the first character, and makes everything lower case",
         f"result = ''\nfor i, c in enumerate({s}):\n    if i > 0 and c.isupper():\n        result += '{j}'\n    result += c.lower()\nreturn result"),
        ("camel", "to_camel", f"joins the words of {s} into one in which every word {'' if upper else 'but the first '}starts with a capital letter",
         f"return ''.join(word.capitalize() for word in {s}.split())" if upper else
         f"first, *rest = {s}.lower().split()\nreturn first + ''.join(word.capitalize() for word in rest)"),
        ("runs", "encode_runs", f"replaces each run of equal characters in {s} by the character and the length of the run",
         f"result, i = '', 0\nwhile i < len({s}):\n    j = i\n    while j < len({s}) and {s}[j] == {s}[i]:\n        j += 1\n"
         f"    result += {s}[i] + str(j - i)\n    i = j\nreturn result"),
        ("acronym", "acronym", f"builds an acronym from the first letters of the words of {s}, in upper case" + (f" and separated by '{j}'" if upper else ""),
         f"return '{j if upper else ''}'.join(word[0].upper() for word in {s}.split())"),
        ("every", "every_nth", f"returns every {_nth(k)} character of {s}, starting with the first", f"return {s}[::{k}]"),
        ("shorten", "shorten", f"returns {s} unchanged if it has at most {k + 6} characters, and else its first {k + 3} characters followed by '...'",
         f"return {s} if len({s}) <= {k + 6} else {s}[:{k + 3}] + '...'"),
        ("pad", "pad", f"pads {s} with '{fill}' on the {'left' if upper else 'right'} to a length of {k + 12}",
         f"return {s}.{'rjust' if upper else 'ljust'}({k + 12}, '{fill}')"),
        ("frequency", "letter_counts", f"returns a dictionary with the number of times that each {'letter' if upper else 'character'} occurs in {s}, "
         f"{'ignoring case' if upper else 'spaces left out'}",
         f"counts = {{}}\nfor c in {s}{'.lower()' if upper else ''}:\n    if {'c.isalpha()' if upper else chr(99) + ' != ' + repr(' ')}:\n"
         "        counts[c] = counts.get(c, 0) + 1\nreturn counts"),
        ("common", "most_common", f"returns the {'letter' if upper else 'word'} that occurs most often in {s}, the alphabetically first one among equals",
         f"items = {'[c for c in ' + s + ' if c.isalpha()]' if upper else s + '.split()'}\nreturn min(items, key=lambda item: (-items.count(item), item))"),
        ("unique", "drop_repeats", f"removes repeated {'characters' if upper else 'words'} from {s} and keeps the first of each, in order",
         f"return {repr('') if upper else repr(' ')}.join(dict.fromkeys({s}{'' if upper else '.split()'}))"),
        ("order", "reverse_order", f"reverses the order of the {'words' if upper else 'letters'} in {s}" + ("" if upper else ", word by word"),
         f"return ' '.join(reversed({s}.split()))" if upper else f"return ' '.join(word[::-1] for word in {s}.split())"),
        ("swap", "alternate", f"makes the characters of {s} at even positions {'upper' if upper else 'lower'} case and all others {'lower' if upper else 'upper'} case",
         f"return ''.join(c.{'upper' if upper else 'lower'}() if i % 2 == 0 else c.{'lower' if upper else 'upper'}() for i, c in enumerate({s}))"),
    ))  # fmt: skip
    cases: list[tuple[str]] = [*_sentences(dice)[:1], ("HelloWideWorld aab",), ("be to be",)]
    return present(dice, Task(f"transform {variation} {upper}", name + dice.choice(("", f"_{s}")), s, does, body, cases))


def _nth(count: int) -> str:
    return {2: "second", 3: "third"}.get(count, f"{count}th")


def parsing(dice: Dice) -> Draft:
    """Small notations: pairs, ranges, durations, versions, records, codes."""
    s = dice.choice(("text", "line", "spec", "raw", "entry"))
    outer, inner = dice.sample((";", ",", "|", "&"), 1)[0], dice.choice(("=", ":"))
    a, b, c = dice.numbers(3, 2, 40)
    words = dice.sample([word.lower() for word in WORDS if word.islower()], 3)
    kind, typed = dice.choice(
        (("int", "int(value)"), ("float", "float(value)"), ("text", "value.strip()"), ("upper", "value.strip().upper()"))
    )
    means = {"int": "integers", "float": "floats", "text": "stripped strings", "upper": "stripped strings in upper case"}[kind]
    pairs = outer.join(f"{word}{inner}{number}" for word, number in zip(words, (a, b, c), strict=True))
    hours, minutes = dice.between(1, 9), dice.between(1, 59)
    unit, factor = dice.choice((("minutes", 1), ("seconds", 60)))
    variation, name, does, body, cases = dice.choice((
        (f"pairs {kind} {outer}{inner}", "parse_pairs", f"turns a string such as '{pairs}' into a dictionary whose values are {means}",
         f"result = {{}}\nfor part in {s}.split('{outer}'):\n    key, value = part.split('{inner}')\n    result[key] = {typed}\nreturn result",
         [(pairs,), (f"x{inner}1",)]),
        (f"list {kind} {outer}", "parse_values", f"splits {s} at '{outer}', skips empty parts and returns the others as a list of {means}",
         f"return [{typed} for value in {s}.split('{outer}') if value.strip()]", [(f"{a}{outer} {b}{outer}{outer}{c}",), ("7",)]),
        (f"duration {unit}", "parse_duration", f"converts a duration such as '{hours}h{minutes}m' to a number of {unit}",
         f"hours, minutes = {s}.rstrip('m').split('h')\nreturn (int(hours) * 60 + int(minutes)) * {factor}" if factor > 1 else
         f"hours, minutes = {s}.rstrip('m').split('h')\nreturn int(hours) * 60 + int(minutes)", [(f"{hours}h{minutes}m",), ("0h5m",)]),
        (f"clock {unit}", "parse_clock", f"returns the number of {unit} since midnight for a time such as '{hours:02d}:{minutes:02d}'",
         f"hours, minutes = map(int, {s}.split(':'))\nreturn " + ("hours * 60 + minutes" if factor == 1 else "hours * 3600 + minutes * 60"),
         [(f"{hours:02d}:{minutes:02d}",), ("23:59",)]),
        (f"range {outer}", "parse_ranges", f"expands a string such as '{a}-{a + 3}{outer}{a + 9}' into the list of all integers it names",
         f"result = []\nfor part in {s}.split('{outer}'):\n    start, _, end = part.partition('-')\n    result.extend(range(int(start), int(end or start) + 1))\nreturn result",
         [(f"{a}-{a + 3}{outer}{a + 9}",), ("5",)]),
        ("version", "parse_version", f"turns a version such as 'v{a}.{b}.{c}' into a tuple of integers; the leading v is optional",
         f"return tuple(int(part) for part in {s}.removeprefix('v').split('.'))", [(f"v{a}.{b}.{c}",), ("3.11",)]),
        (f"record {outer}", "parse_record", f"parses lines such as '{words[0]}{outer}{a}{outer}{b}' into a dictionary with name, count and price (integers)",
         f"name, count, price = {s}.split('{outer}')\nreturn {{'name': name, 'count': int(count), 'price': int(price)}}", [(f"{words[0]}{outer}{a}{outer}{b}",)]),
        (f"comment {outer}", "strip_comment", f"returns {s} without the comment that starts at the first '#', and without blanks at its end",
         f"return {s}.split('#', 1)[0].rstrip()", [(f"{words[0]} = {a}  # {words[1]}",), ("# only",), ("plain",)]),
        ("tag", "inner_text", f"returns what stands between the first '<b>' and the next '</b>' in {s}, or None if there is no such pair",
         f"_, opened, rest = {s}.partition('<b>')\ninner, closed, _ = rest.partition('</b>')\nreturn inner if opened and closed else None",
         [(f"a <b>{words[0]}</b> c",), ("none",)]),
        (f"sum {outer}", "sum_fields", f"adds up the integers in {s}, which are separated by '{outer}'; parts that are not whole numbers are ignored",
         f"parts = [part.strip() for part in {s}.split('{outer}')]\nreturn sum(int(part) for part in parts if part.isdigit())",
         [(f"{a}{outer}{words[0]}{outer} {b}",), ("",)]),
        ("brackets", "balanced", f"checks whether the round and square brackets in {s} are balanced",
         f"stack = []\nfor c in {s}:\n    if c in '([':\n        stack.append(c)\n    elif c in ')]':\n        if not stack or stack.pop() + c not in ('()', '[]'):\n"
         "            return False\nreturn not stack", [(f"[{a} + ({b})]",), ("(]",), ("((",)]),
        ("colour", "parse_colour", f"converts a colour such as '#ff{a + 16:02x}00' to a tuple of three integers from 0 to 255",
         f"return tuple(int({s}[i:i + 2], 16) for i in (1, 3, 5))", [(f"#ff{a + 16:02x}00",), ("#000000",)]),
    ))  # fmt: skip
    return present(dice, Task(f"parsing {variation}", name, s, does, body, cases))


FAMILIES = (characters, words, transform, parsing)
