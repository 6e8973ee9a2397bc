"""Data of preferences, with a chosen and a rejected answer to each prompt: no shape that can be trained, but what would work is said."""

from cora_cli.data.formats.shape import Raw

_PROMPTS = ("prompt", "question", "instruction", "query", "input")
_PAIR = {"chosen", "rejected"}


def advice_for_preferences(record: Raw) -> str | None:
    """How to train on the chosen answers of data of preferences; None for records that are none."""
    if not record.keys() >= _PAIR:
        return None
    chosen = record["chosen"]
    prompt = next((name for name in _PROMPTS if name in record), None)
    start = "data of preferences, of which cora can train the chosen answers:"
    if isinstance(chosen, list) and (len(chosen) > 1 or prompt is None):
        return f"{start} --columns messages=chosen"
    if prompt is None:
        return f"{start} --columns text=chosen takes them as they are, with loss on all of the text"
    if isinstance(chosen, list) and isinstance(record[prompt], str) and not record[prompt].lstrip().startswith("["):
        return f"{start} write {prompt} as a list of messages too, then give --columns prompt={prompt},response=chosen"
    if prompt == "instruction" and record.get("input"):
        return f"{start} --columns prompt=instruction,input=input,response=chosen"
    return f"{start} --columns prompt={prompt},response=chosen"
