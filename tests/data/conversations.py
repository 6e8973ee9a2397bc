"""Chat templates and conversations that several tests share."""

from transformers import AutoTokenizer

from cora_cli import embedded

TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
}
QUESTION = TALK["messages"][1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"


def with_template(text, eos="<|endoftext|>"):
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_directory())
    tokenizer.chat_template, tokenizer.eos_token = text, eos
    return tokenizer
