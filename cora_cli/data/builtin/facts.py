"""Questions about common knowledge: explanations, definitions, comparisons, instructions and ideas from `knowledge`.

A held-out concept, word or country is never explained in the training records, in any wording.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.knowledge import CONCEPTS, COUNTRIES, CREATURES, IDEAS, PROCEDURES, VOCABULARY
from cora_cli.data.builtin.words import NAMES, articles, capital, listing


def explain(dice: Dice) -> Draft:
    """A concept: its meaning, and an example or its importance where asked."""
    name = dice.choice(list(CONCEPTS))
    meaning, example, importance = CONCEPTS[name]
    core = f"{capital(name)} is {meaning}."
    asks, answer = dice.choice((
        (("Explain {} in one sentence.", "Define {} briefly.", "Give a short definition of {}."), core),
        (("Explain {} and give an example.", "What does {} mean? Illustrate it.", "Describe {} with an example."), f"{core} For example, {example}."),
        (("Explain {} and why it matters.", "What is important about {}?", "Why should people know about {}?"),
         f"{core} This matters because {importance}."),
        (("Explain {} to a beginner, with an example and the reason why it is important.", "Write a short paragraph about {}."),
         f"{core} For example, {example}. This is important because {importance}."),
    ))  # fmt: skip
    return Draft(dice.choice(asks).format(name), answer, group=name)


def vocabulary(dice: Dice) -> Draft:
    """A word's meaning, use, synonym or antonym."""
    word = dice.choice(list(VOCABULARY))
    part, meaning, sentence, similar, opposite = VOCABULARY[word]
    asks, answer = dice.choice((
        (('What does the word "{}" mean? Use it in a sentence.', 'Define "{}" and give an example sentence.'),
         f"{capital(word)} ({part}) means {meaning}. Example: {sentence}"),
        (('Give a synonym and an antonym of "{}".', 'Name a word that means the same as "{}" and one that means the opposite.'),
         f"A synonym of {word} is {similar}, and an antonym is {opposite}."),
        (('Explain the {1} "{0}" and name its opposite.', 'What is the meaning of the {1} "{0}", and what is the opposite?'),
         f"{capital(word)} means {meaning}. The opposite is {opposite}."),
        (('Write a sentence with the word "{}".', 'Show how "{}" is used in a sentence.'), sentence),
    ))  # fmt: skip
    return Draft(dice.choice(asks).format(word, part), answer, group=word)


def instructions(dice: Dice) -> Draft:
    """The steps of a procedure: all, shuffled ones in order, or the one that follows."""
    asks: tuple[str, ...]
    goal = dice.choice(list(PROCEDURES))
    steps = PROCEDURES[goal]
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    kind = dice.below(3)
    if kind == 0:
        asks = (
            "Explain step by step how to {}.",
            "Write instructions for someone who wants to {}.",
            "How do I {}? List the steps.",
            "Make a checklist: how to {}.",
        )
        return Draft(dice.choice(asks).format(goal), numbered, group=goal)
    if kind == 1:
        mixed = dice.shuffled(steps)
        asks = ("These steps to {} are mixed up. Put them in the right order.", "Order the following steps to {}.")
        return Draft(dice.choice(asks).format(goal), numbered, "\n".join(f"- {step}" for step in mixed), group=goal)
    index = dice.below(len(steps) - 1)
    asks = (
        'Somebody wants to {} and has just done this: "{}" What comes next?',
        'To {}, what should be done after this step: "{}"',
    )
    return Draft(dice.choice(asks).format(goal, steps[index]), f"The next step is: {steps[index + 1]}", group=goal)


def ideas(dice: Dice) -> Draft:
    """A list of ideas on a topic."""
    topic = dice.choice(list(IDEAS))
    count = dice.between(2, 5)
    chosen = dice.sample(IDEAS[topic], count)
    number = ("two", "three", "four", "five")[count - 2]
    asks = (
        "List {} {}.",
        "Give me {} {}.",
        "Suggest {} {}.",
        "Name {} {}, one per line.",
        "{name} asks for {} {}. Answer with a list.",
    )
    instruction = dice.choice(asks).format(number, topic, name=dice.choice(NAMES))
    return Draft(instruction, "\n".join(f"- {idea}" for idea in chosen), group=topic)


def countries(dice: Dice) -> Draft:
    """Capital, continent, language and currency of one country or of two."""
    first, second = dice.sample(list(COUNTRIES), 2)
    (capital_one, continent, language, money), (capital_two, continent_two, language_two, _) = (
        COUNTRIES[first],
        COUNTRIES[second],
    )
    asks, answer = dice.choice((
        (("What is the capital of {0}, and on which continent is it?", "Name the capital and the continent of {0}."),
         f"The capital of {first} is {capital_one}. {first} is in {continent}."),
        (("Which language is mainly spoken in {0}, and what is its currency?", "What do people speak and pay with in {0}?"),
         f"The main language of {first} is {language}, and its currency is the {money}."),
        (("I am travelling to {0}. Tell me its capital, language and currency.", "Write a short profile of {0} with capital, language and currency."),
         f"{first} is a country in {continent}. Its capital is {capital_one}, the main language is {language}, and people pay with the {money}."),
        (("Compare {0} and {1}: capital, continent and language.", "What are the capitals, continents and languages of {0} and {1}?"),
         f"The capital of {first} is {capital_one}, and that of {second} is {capital_two}. "
         + (f"Both are in {continent}" if continent == continent_two else f"{first} is in {continent} and {second} in {continent_two}")
         + (f", and {language} is spoken in both." if language == language_two else f"; people speak {language} and {language_two}.")),
    ))  # fmt: skip
    return Draft(dice.choice(asks).format(first, second), answer, group=first)


def compare_animals(dice: Dice) -> Draft:
    """What two animals share and where they differ, or a riddle."""
    asks: tuple[str, ...]
    first, second = dice.sample(list(CREATURES), 2)
    (kind, food, home, legs), (kind_two, food_two, home_two, legs_two) = CREATURES[first], CREATURES[second]
    if dice.chance(0.3):
        asks = ("Describe a {} in two sentences.", "What kind of animal is a {}, what does it eat, and where does it live?")
        limbs = f"with {legs} legs" if legs else "without legs"
        return Draft(
            articles(dice.choice(asks).format(first)),
            articles(f"A {first} is a {kind} {limbs}. It eats {food} and lives {home}."),
            group=first,
        )
    shared: list[str] = []
    differing: list[str] = []
    for same, common, contrast in (
        (
            kind == kind_two,
            f"are {kind}s" if kind != "fish" else "are fish",
            f"a {first} is a {kind}, but a {second} is a {kind_two}",
        ),
        (food == food_two, f"eat {food}", f"a {first} eats {food}, but a {second} eats {food_two}"),
        (
            legs == legs_two,
            f"have {legs} legs" if legs else "have no legs",
            f"a {first} has {legs or 'no'} legs, but a {second} has {legs_two or 'no'}",
        ),
        (home == home_two, f"live {home}", f"a {first} lives {home}, but a {second} lives {home_two}"),
    ):
        (shared if same else differing).append(common if same else contrast)
    answer = f"Both {listing(shared)}. " if shared else "They have little in common. "
    answer += capital("; ".join(differing[:2])) + "." if differing else ""
    asks = (
        "Compare a {} with a {}.",
        "What do a {} and a {} have in common, and how do they differ?",
        "Name similarities and differences of a {} and a {}.",
    )
    return Draft(
        articles(dice.choice(asks).format(first, second)), articles(answer.strip()), group=" ".join(sorted((first, second)))
    )


FAMILIES = (explain, vocabulary, instructions, ideas, countries, compare_animals)
