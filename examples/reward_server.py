"""Rewards from a server that speaks the OpenAI chat protocol (vLLM, SGLang, llama.cpp, a cloud's): a model judges.

    var-kernels train --method grpo --online --reward reward_server:score ...

``JUDGE_URL`` and ``JUDGE_MODEL`` name the server and its model, ``JUDGE_KEY`` a key where it asks for one. Requests
of a call run side by side. Any other service is a function of the same form: prompts and completions in, floats out.
"""

import json
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

QUESTION = (
    "How good is this answer, from 0 (useless) to 10 (perfect)? Reply with the number alone.\n\n"
    "Question: {prompt}\n\nAnswer: {completion}"
)


def score(prompts, completions) -> list[float]:
    """0 to 1 of each completion."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(judge, map(text_of, prompts), map(text_of, completions)))


def judge(prompt: str, completion: str) -> float:
    body = {
        "model": os.environ.get("JUDGE_MODEL", "default"),
        "messages": [{"role": "user", "content": QUESTION.format(prompt=prompt, completion=completion)}],
        "temperature": 0,
        "max_tokens": 8,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', 'none')}"}
    url = os.environ.get("JUDGE_URL", "http://localhost:8000").rstrip("/") + "/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120) as reply:
        answer = json.load(reply)["choices"][0]["message"]["content"]
    number = re.search(r"\d+(\.\d+)?", answer)
    if number is None:  # the run stops and names the row; a 0 here would be learnt from
        raise ValueError(f"the judge gave no number: {answer[:80]!r}")
    return min(float(number[0]), 10.0) / 10


def text_of(messages) -> str:
    """Plain text, or the contents of a conversation."""
    return messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)
