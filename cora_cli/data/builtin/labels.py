"""Texts to be labelled: the sentiment of a review, the topic of a notice, the urgency of a message to a help desk.

The texts are put together from clauses; each answer names the evidence, so that it is more than one word.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import POOLS, Pools, capital, fill, listing

# What is reviewed, with clauses that praise and clauses that complain. Each reads on after "I find that ".
REVIEWED = (
    ("hotel in {town}",
     ("the room was spotless", "the staff remembered our names", "breakfast was fresh and plentiful", "the bed was very comfortable",
      "check-in took two minutes", "the view over the harbour was lovely", "our room was wonderfully quiet"),
     ("the shower was cold", "the walls were paper-thin", "nobody answered the phone at the desk", "the carpet smelled of smoke",
      "we waited an hour for the key", "breakfast was over before nine", "the bill had two mistakes")),
    ("restaurant in {town}",
     ("the soup was excellent", "the waiter gave good advice", "portions were generous", "prices were fair", "the dessert was a delight",
      "our table was ready on time", "the bread was still warm"),
     ("the fish was overcooked", "we waited fifty minutes for a salad", "the waiter was rude", "the coffee was cold", "the music was far too loud",
      "they forgot half of our order", "the plates were not clean")),
    ("{good}",
     ("it does exactly what it promises", "it feels solid", "delivery took a single day", "setting it up was easy",
      "it still looks new after {few} months", "customer service was friendly", "it is worth every cent"),
     ("it broke after {few} days", "the manual is useless", "it arrived with a scratch", "it smells of plastic",
      "a part was missing", "it looks cheaper than in the photo", "the shop refused to take it back")),
    ("film", 
     ("the acting was moving", "the ending surprised me", "the music fitted perfectly", "I laughed a lot", "the pictures were stunning",
      "the dialogue was clever", "the two hours flew by"),
     ("the plot made no sense", "I nearly fell asleep", "the jokes were stale", "it was an hour too long", "the main actor was wooden",
      "the ending was obvious from the start", "the sound was terrible")),
    ("online course about {course}",
     ("the lessons were clear", "the teacher answered every question", "the exercises were fun", "I learned more than I had hoped",
      "the videos were short and useful", "the pace was just right", "the examples came from real life"),
     ("the videos kept stopping", "the material was out of date", "nobody replied in the forum", "the tests had wrong answers",
      "it was much too basic", "the teacher read from slides", "half of the links were dead")),
)  # fmt: skip
REVIEW_POOLS: Pools = POOLS | {
    "course": ("cooking", "statistics", "gardening", "web design", "photography", "Italian", "bookkeeping")
}
NEUTRAL = (
    "This was my second try.",
    "A friend had told me about it.",
    "I paid with a voucher.",
    "I had waited for it since {month}.",
)
VERDICTS = {
    "positive": ("I would choose it again.", "I can only recommend it.", "Well done!", ""),
    "negative": ("Never again.", "I want my money back.", "I cannot recommend it.", ""),
    "mixed": ("I am not sure about it.", "It could be better and it could be worse.", ""),
}


def _review(dice: Dice) -> tuple[str, str, list[str]]:
    """Text, label and the clauses that justify the label."""
    subject, praise, complaints = dice.choice(REVIEWED)
    label = dice.choice(("positive", "negative", "mixed"))
    if label == "mixed":
        clauses = [*dice.sample(praise, dice.between(1, 2)), dice.choice(complaints)]
        joint = dice.choice(("{0}, but {1}.", "{0}. Unfortunately, {1}.", "although {0}, {1}."))
    else:
        clauses = dice.sample(praise if label == "positive" else complaints, dice.between(2, 3))
        joint = dice.choice(("{all}.", "{0}. Also, {1}.", "{0}, and besides, {1}."))
    body = capital(joint.format(listing(clauses[:-1]), clauses[-1], all=listing(clauses)))
    opening = dice.choice(("", "My review of this {s}: ", "About the {s}: ", "A few words on the {s}. ")).replace(
        "{s}", subject
    )
    parts = [opening + body, dice.choice(VERDICTS[label])]
    if dice.chance(0.4):
        parts.insert(1, dice.choice(NEUTRAL))
    text, *evidence = fill(dice, [" ".join(part for part in parts if part), *clauses], REVIEW_POOLS)
    return text, label, evidence


def sentiment(dice: Dice) -> Draft:
    """Sentiment of a review, with what shows it."""
    text, label, evidence = _review(dice)
    instruction = dice.choice((
        "Classify the sentiment of this review as positive, negative or mixed, and give the reason.",
        "Is this review positive, negative or mixed? Say why in one sentence.",
        "Decide whether the customer is satisfied (positive), unhappy (negative) or in between (mixed), and justify it.",
        "What is the sentiment of the text: positive, negative or mixed? Explain.",
    ))  # fmt: skip
    verb = {"positive": "praises", "negative": "criticises", "mixed": "weighs"}[label]
    return Draft(
        instruction,
        f"{capital(label)}. The writer {verb} {('two', 'three')[len(evidence) - 2]} points: {listing(evidence)}.",
        text,
    )


def sentiment_task(dice: Dice) -> Draft:
    """Sentiment of a review in a fixed two-line form."""
    text, label, evidence = _review(dice)
    instruction = dice.choice((
        "Label the sentiment of the review and quote the evidence.",
        "Sentiment analysis: give the label (positive, negative, mixed) and the evidence.",
        "Find the sentiment of this customer review and what it rests on.",
    ))  # fmt: skip
    return Draft(instruction, f"Sentiment: {label}\nEvidence: {'; '.join(evidence)}", text)


TOPICS = {
    "sport": ("The {town} runners finished {few} minutes ahead.", "The coach named a new goalkeeper for the match on {day}.",
              "After extra time the visitors from {town} scored {few} penalties.", "The swimmer broke a record that had stood since {year}."),
    "business": ("The company in {town} will hire {hundreds} people this year.", "Sales of the new {good} rose by {some} per cent in {month}.",
                 "Shares fell after the firm reported a loss.", "A bank from {town} lowered its interest rates on {workday}."),
    "science": ("Researchers in {town} measured the light of a distant galaxy.", "The new telescope has taken its first {few} pictures.",
                "A team found {some} unknown species of beetle.", "Chemists have made a battery that lasts {few} times longer."),
    "health": ("Doctors in {town} advise a flu vaccination before {month}.", "The clinic now opens at {hour} for patients without appointment.",
               "Nurses warn that sleeping under {few} hours harms the heart.", "The hospital has cut waiting times by {some} days."),
    "weather": ("Expect {few} centimetres of snow in {town} by {day}.", "A storm from the west will reach {town} around {hour}.",
                "After {some} dry days, rain returns on {day}.", "Fog will make driving near {town} dangerous."),
    "culture": ("The museum in {town} shows {many} paintings until {month}.", "The orchestra plays a new symphony on {day} at {hour}.",
                "The novelist read from her latest book in {town}.", "Tickets for the theatre festival in {month} sold out in {few} hours."),
}  # fmt: skip
CUES = {
    "sport": "a competition and those who take part in it", "business": "companies, money or jobs", "science": "research and its findings",
    "health": "medicine and care for patients", "weather": "what the sky will bring", "culture": "the arts and their audience",
}  # fmt: skip


def topic(dice: Dice) -> Draft:
    """Topic of a notice of two sentences."""
    label = dice.choice(list(TOPICS))
    text = " ".join(fill(dice, dice.sample(TOPICS[label], 2)))
    choices = listing(dice.shuffled(list(TOPICS)), "or")
    instruction = dice.choice((
        "Assign the text to one topic: {}.", "Which topic fits this notice best: {}?", "Choose the right section of a newspaper for it: {}.",
    )).format(choices)  # fmt: skip
    return Draft(instruction, f"{capital(label)}, because it is about {CUES[label]}.", text)


REQUESTS = (
    ("high", "billing", "I was charged {few} times for order {order}, and my account is now empty.", "the customer has lost money"),
    ("high", "technical", "Since {hour} nobody in our office of {some} people can log in.", "many people cannot work"),
    ("high", "delivery", "The {good} of order {order} must be here by tomorrow for an exam, and it has not been sent.", "there is a deadline tomorrow"),
    ("high", "account", "Someone else is using my account and has changed the address to {town}.", "the account has been taken over"),
    ("medium", "delivery", "My order {order} was due on {day}, but the {good} has not arrived.", "the delivery is late but nothing is lost"),
    ("medium", "billing", "The invoice for order {order} shows the wrong address; I live in {town}.", "the invoice needs a correction"),
    ("medium", "technical", "The app closes by itself about {few} times a day.", "the app works, though not reliably"),
    ("medium", "account", "I cannot change my phone number in the settings; it fails with error {hundreds}.", "one setting cannot be changed"),
    ("low", "billing", "Can I get the invoices of {year} as one file?", "it is a wish without time pressure"),
    ("low", "technical", "It would be nice if the app had a dark theme, as {name} suggested on {day}.", "it is only a suggestion"),
    ("low", "delivery", "Do you also ship a {good} to {town}?", "it is a general question"),
    ("low", "account", "How do I change the picture of my profile? {name} could not tell me.", "it is a simple question"),
)  # fmt: skip
GREETINGS = ("Hello!", "Hi there!", "Good morning.", "Dear team!", "")
THANKS = ("Thank you, {name2}", "Regards, {name2} {surname}", "{name2}", "Please reply soon. {name2}")


def triage(dice: Dice) -> Draft:
    """Priority and department of a message to a help desk."""
    priority, department, message, reason = dice.choice(REQUESTS)
    (text,) = fill(dice, [" ".join(part for part in (dice.choice(GREETINGS), message, dice.choice(THANKS)) if part)])
    instruction = dice.choice((
        "Sort this support message: priority (low, medium, high) and department (billing, technical, delivery, account), with a reason.",
        "How urgent is this message, and which department should handle it: billing, technical, delivery or account?",
    ))  # fmt: skip
    return Draft(instruction, f"Priority: {priority}. Department: {department}. Reason: {reason}.", text)


FAMILIES = (sentiment, topic, triage)
