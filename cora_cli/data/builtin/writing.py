"""Writing to order: tone, short e-mails, grammar, tense and voice.

Messages come in an informal and a formal wording of the same content, so each can be rewritten as the other.
"""

from cora_cli.data.builtin.build import Dice, Draft
from cora_cli.data.builtin.words import POOLS, Pools, capital, fill, listing

# The same request in both tones.
MESSAGES = (
    ("can you send me the {paper} by {day}?", "could you please send me the {paper} by {day}?"),
    ("sorry, I can't make it to the {meeting} on {day}.", "I regret that I am unable to attend the {meeting} on {day}."),
    ("the {good} I got is broken and I want my money back.", "the {good} that I received is defective, and I would like to request a refund."),
    ("thanks a lot for helping me out with the {paper}.", "thank you very much for your support with the {paper}."),
    ("let's move the {meeting} to {day}, ok?", "I would like to suggest that we move the {meeting} to {day}."),
    ("you still haven't paid for the {good}.", "our records show that the payment for the {good} is still outstanding."),
    ("no idea when the {paper} will be done, ask {name}.", "I do not know when the {paper} will be finished; please contact {name}."),
    ("the new {paper} is way too long, cut it down.", "the new {paper} is rather long; I would be grateful if you could shorten it."),
    ("I need {few} days off from {day}.", "I would like to apply for {few} days of leave, starting on {day}."),
    ("we messed up your order for the {good}.", "we apologise for the mistake that we made with your order for the {good}."),
    ("come to the {meeting} on {day}, it'll be fun!", "we would be delighted to welcome you to the {meeting} on {day}."),
    ("{name} is off sick, so I'm doing the {paper} now.", "as {name} is ill, I have taken responsibility for the {paper}."),
    ("how much is the {good}?", "could you please inform me about the price of the {good}?"),
    ("hurry up with the {paper}, the boss wants it on {day}.",
     "please give priority to the {paper}, as the management expects it on {day}."),
)  # fmt: skip
FOLLOW_UPS = (
    ("Call me if you've got questions.", "Please call me if you have any questions."),
    ("Have a nice weekend!", "I wish you a pleasant weekend."),
    ("I really need an answer today.", "I would be grateful for an answer today."),
    ("It's a big deal for us.", "This matter is important to us."),
    ("Get back to me soon.", "I look forward to your reply."),
)
CASUAL = (("Hey {name2},", "Cheers, {name3}"), ("Hi {name2},", "See you, {name3}"), ("Hi {name2}!", "Bye, {name3}"))
FORMAL = (
    ("Dear {name2},", "Kind regards, {name3}"),
    ("Dear {name2},", "Yours sincerely, {name3}"),
    ("Dear {name2},", "Best regards, {name3}"),
)
LETTER_POOLS: Pools = POOLS | {
    "paper": (
        "report",
        "budget",
        "contract",
        "offer",
        "time sheet",
        "presentation",
        "price list",
        "brochure",
        "schedule",
        "invoice",
    ),
    "job": ("translation", "summer camp", "language course", "market stall", "night shift", "moving company", "school garden"),
    "meeting": (
        "team meeting",
        "workshop",
        "interview",
        "summer party",
        "training",
        "site visit",
        "planning session",
        "open day",
    ),
}


def rewrite_tone(dice: Dice) -> Draft:
    """An informal message made formal, or the other way round."""
    message, follow = dice.choice(MESSAGES), dice.choice(FOLLOW_UPS)
    informal_frame, formal_frame = dice.choice(CASUAL), dice.choice(FORMAL)
    formality = dice.chance(0.65)
    texts = [
        f"{frame[0]} {(body if frame[0].endswith(',') else capital(body))} {extra} {frame[1]}"
        for frame, body, extra in ((informal_frame, message[0], follow[0]), (formal_frame, message[1], follow[1]))
    ]
    informal, formal = fill(dice, texts, LETTER_POOLS)
    if formality:
        asks = (
            "Rewrite this message in a formal tone.",
            "Make the following text more polite and professional.",
            "Put this note into formal English.",
        )
        return Draft(dice.choice(asks), formal, informal)
    asks = (
        "Rewrite this message in a casual tone, as to a friend.",
        "Make this text sound relaxed and informal.",
        "Say this in everyday language.",
    )
    return Draft(dice.choice(asks), informal, formal)


# What the mail is about, its subject line, and sentences from which two or three are taken in order.
MAILS = (
    ("to ask {name} to move the {meeting} to {day}", "Moving our {meeting}",
     ("I hope you are well.", "Something has come up, and I cannot attend our {meeting} as planned.",
      "Would {day} at {hour} suit you instead?", "Please tell me if another time is better.")),
    ("to thank {name} for the help with the {paper}", "Thank you",
     ("I would like to thank you for your help with the {paper}.", "Your comments made it much clearer, and it was finished on time.",
      "I hope that I can return the favour soon.")),
    ("to complain to {name} that the {good} of order {order} arrived broken", "Broken item in order {order}",
     ("The {good} from my order {order} arrived today, but it is broken.", "Please send me a replacement or refund the price.",
      "I have attached {few} photos that show the damage.", "I look forward to your answer.")),
    ("to invite {name} to the {meeting} on {day}", "Invitation to our {meeting}",
     ("I would like to invite you to our {meeting} on {day}.", "It begins at {hour} and takes place in {town}.",
      "About {some} people will be there.", "Please let me know by {workday} if you can come.")),
    ("to ask {name} for {few} days of holiday in {month}", "Holiday in {month}",
     ("I would like to take {few} days of holiday in {month}.", "{name3} has agreed to look after my tasks.",
      "The {paper} will be finished before I leave.", "Please let me know if this suits you.")),
    ("to remind {name} that the {paper} is due on {day}", "Reminder: {paper}",
     ("This is a friendly reminder that the {paper} is due on {day}.", "If you need more time, please tell me by {workday}.",
      "I am happy to help with open questions.")),
    ("to apologise to {name} for missing the {meeting} on {day}", "My absence on {day}",
     ("I am sorry that I missed the {meeting} on {day}.", "My train was late, and my phone had no battery left.",
      "Could you send me the notes, so that I can catch up?")),
    ("to tell {name} that the office in {town} is closed on {day}", "Office closed on {day}",
     ("Please note that our office in {town} is closed on {day}.", "Technicians will repair the heating that day.",
      "You can work from home, and urgent calls go to {name3}.")),
    ("to ask {name} for the price of {some} {good}s", "Request for a quotation",
     ("We are planning to order {some} of your {good}s.", "Could you please send us your best price and the delivery time?",
      "Delivery would be to {town}.", "We would need an offer by {day}.")),
    ("to recommend {name3} to {name} for the {job}", "Recommendation for the {job}",
     ("I heard that you are looking for help with the {job}.", "I can warmly recommend {name3}.",
      "We worked together for {few} years, and the results were always good.", "I can put you in touch on {day}.")),
)  # fmt: skip


def write_email(dice: Dice) -> Draft:
    """A short e-mail for a purpose."""
    purpose, subject, body = dice.choice(MAILS)
    extra = dice.between(0, len(body) - 2)
    kept = [0, 1, *sorted(dice.sample(range(2, len(body)), extra))]
    instruction = dice.choice((
        "Write a short e-mail {}. Sign as {{name2}}.", "Draft a brief e-mail from {{name2}} {}.", "Compose a polite e-mail {}, signed by {{name2}}.",
    )).format(purpose)  # fmt: skip
    mail = f"Subject: {subject}\n\nDear {{name}},\n\n{' '.join(body[index] for index in kept)}\n\n{dice.choice(('Best regards', 'Kind regards'))},\n{{name2}}"
    hints = [f"{label}: {slot}" for label, slot, phrase in HINTS if phrase in mail and slot not in instruction]
    instruction, mail, details = fill(dice, [instruction, mail, "; ".join(hints)], LETTER_POOLS)
    return Draft(instruction, mail, details, group=f"{instruction}\n{details}")


# Facts that the mail mentions but its purpose does not are given as notes.
HINTS = (
    ("time", "{hour}", "{hour}"), ("town", "{town}", "{town}"), ("photos", "{few}", "{few} photos"), ("guests", "{some}", "{some} people"),
    ("answer by", "{workday}", "{workday}"), ("colleague", "{name3}", "{name3}"), ("years of working together", "{few}", "{few} years"),
    ("day", "{day}", "{day}"), ("document", "{paper}", "{paper}"),
)  # fmt: skip

# Wrong sentence, right sentence, what was wrong.
MISTAKES = (
    ("{name} don't like the {good}.", "{name} doesn't like the {good}.", "after he, she or a name the verb is doesn't"),
    ("There is {few} {good}s on the table.", "There are {few} {good}s on the table.", "a plural needs are"),
    ("{name} and {name2} was in {town} on {day}.", "{name} and {name2} were in {town} on {day}.", "two people need were"),
    ("Me and {name} went to {town}.", "{name} and I went to {town}.", "the subject form is I, and it comes last"),
    ("The dog has lost it's toy near the {good}.", "The dog has lost its toy near the {good}.", "its without apostrophe shows possession"),
    ("Their going to {town} on {day}.", "They're going to {town} on {day}.", "They're is short for they are"),
    ("{name} should of called before {hour}.", "{name} should have called before {hour}.", "should is followed by have"),
    ("I have saw {name} in {town}.", "I have seen {name} in {town}.", "the participle of see is seen"),
    ("Yesterday {name} buy {few} {good}s.", "Yesterday {name} bought {few} {good}s.", "yesterday asks for the past tense"),
    ("{name} is more taller than {name2}.", "{name} is taller than {name2}.", "taller is a comparative already"),
    ("We was waiting for {name} since {hour}.", "We have been waiting for {name} since {hour}.", "since asks for the present perfect"),
    ("There are less people in {town} than in {town2}.", "There are fewer people in {town} than in {town2}.", "people can be counted, so it is fewer"),
    ("{name} didn't saw the {good}.", "{name} didn't see the {good}.", "after didn't the verb keeps its basic form"),
    ("Your late for the train to {town}.", "You're late for the train to {town}.", "You're is short for you are"),
    ("The {good}s is too expensive for {name}.", "The {good}s are too expensive for {name}.", "a plural needs are"),
    ("{name} has lived in {town} since {few} years.", "{name} has lived in {town} for {few} years.", "a length of time takes for"),
    ("I am looking forward to see {name} in {month}.", "I am looking forward to seeing {name} in {month}.", "looking forward to takes the -ing form"),
    ("{name} gave {name2} a good advice in {town}.", "{name} gave {name2} some good advice in {town}.", "advice cannot be counted"),
    ("if {name} comes on {day}, we will go to {town}", "If {name} comes on {day}, we will go to {town}.",
     "a sentence starts with a capital letter and ends with a full stop"),
    ("{name} can speaks to the people from {town}.", "{name} can speak to the people from {town}.", "after can the verb has no -s"),
)  # fmt: skip


def correct_grammar(dice: Dice) -> Draft:
    """A sentence without its mistake, sometimes with the rule."""
    *pair, rule = dice.choice(MISTAKES)
    wrong, right = fill(dice, pair)
    if dice.chance(0.45):
        explain = ("Correct the sentence and explain the mistake.", "What is wrong with this sentence? Correct it.")
        return Draft(dice.choice(explain), f"{right} ({capital(rule)}.)", wrong)
    asks = (
        "Correct the grammar.",
        "Fix the mistake in this sentence.",
        "Rewrite the sentence in correct English.",
        "Proofread the sentence below.",
    )
    return Draft(dice.choice(asks), right, wrong)


# present, past, participle, object
VERBS = (
    ("writes", "wrote", "written", "the {paper}"), ("paints", "painted", "painted", "the fence"), ("repairs", "repaired", "repaired", "the {good}"),
    ("sells", "sold", "sold", "the {good}"), ("cleans", "cleaned", "cleaned", "the kitchen"), ("takes", "took", "taken", "the last photo"),
    ("chooses", "chose", "chosen", "the winner"), ("prepares", "prepared", "prepared", "the {meeting}"), ("bakes", "baked", "baked", "the bread"),
    ("signs", "signed", "signed", "the {paper}"), ("teaches", "taught", "taught", "the new course"), ("finds", "found", "found", "the missing {good}"),
)  # fmt: skip
TIMES = {"present": "every {day}", "past": "last {day}", "future": "next {day}"}


def change_verb(dice: Dice) -> Draft:
    """A sentence in another tense, in the passive voice, or as a question."""
    present, past, participle, thing = dice.choice(VERBS)
    stem = present[:-2] if present == "teaches" else present[:-1]
    forms = {
        "present": (present, f"is {participle}", f"Does {{name}} {stem}"),
        "past": (past, f"was {participle}", f"Did {{name}} {stem}"),
        "future": (f"will {stem}", f"will be {participle}", f"Will {{name}} {stem}"),
    }
    tense, other = dice.sample(list(forms), 2)
    place = dice.choice(("", " in {town}"))
    source = f"{{name}} {forms[tense][0]} {thing}{place} {TIMES[tense]}."
    asks, target = dice.choice((
        (("Put this sentence into the {} tense and adapt the time.", "Rewrite the sentence in the {} tense with a fitting time."),
         f"{{name}} {forms[other][0]} {thing}{place} {TIMES[other]}."),
        (("Change the sentence to the passive voice.", "Rewrite this in the passive."), f"{thing} {forms[tense][1]} by {{name}}{place} {TIMES[tense]}."),
        (("Turn the statement into a question.", "Make a yes-or-no question of this."), f"{forms[tense][2]} {thing}{place} {TIMES[tense]}?"),
    ))  # fmt: skip
    text, answer = fill(dice, [source, target], LETTER_POOLS)
    return Draft(dice.choice(asks).format(other), capital(answer), text)


# Facts of a sentence each; a text is made by joining them.
TRAITS = ("works as a nurse", "plays the violin", "has {few} cats", "comes from {town}", "speaks {few} languages", "grows vegetables on the balcony",
          "collects old maps", "runs {few} kilometres a day", "is learning to sail", "sings in a choir", "repairs bicycles for friends",
          "bakes bread on {workday}s", "moved to {town2} in {year}", "would like to see {town3}")  # fmt: skip


def combine_facts(dice: Dice) -> Draft:
    """Notes about a person as one sentence."""
    traits = dice.sample(TRAITS, dice.between(3, 4))
    filled = fill(dice, ["{name}", *traits])
    name, facts = filled[0], filled[1:]
    asks = (
        "Join these notes into one sentence.",
        "Write one sentence that contains all of these facts.",
        "Combine the facts below into a single sentence.",
    )
    return Draft(dice.choice(asks), f"{name} {listing(facts)}.", "\n".join(f"- {name} {fact}" for fact in facts))


FAMILIES = (rewrite_tone, write_email, correct_grammar, change_verb, combine_facts)
