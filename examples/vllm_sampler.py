"""Completions from a vLLM server for online training of a LoRA adapter, with the log-probs at which they were drawn.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve NAME --enable-lora --max-lora-rank 16 \
        --logprobs-mode processed_logprobs
    var-kernels train --model NAME --lora r=16 --method grpo --online --dataset prompts.jsonl \
        --reward my_rewards:score --sampler vllm_sampler:sampler --importance-cap 2 --output-dir runs/grpo

The server must see the folder of the adapters: the same machine, or a shared file system. ``VLLM_URL`` and
``VLLM_ADAPTERS`` name other places than http://localhost:8000 and ./adapters. A policy that is trained whole needs an
engine in this process instead: any callable of the form of ``Sampler`` will do.
"""

import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from var_kernels.integrations.trainer.online import Samples


class VLLMSampler:
    """A ``Sampler``: the adapter goes to the server whenever it has changed, under a new name."""

    def __init__(self, url: str, adapters: str | os.PathLike):
        self.url, self.adapters, self.name = url.rstrip("/"), Path(adapters).absolute(), ""

    def __call__(self, model, prompts, *, n, temperature, max_new_tokens, seed):
        answer = self._post("completions", {
            "model": self._policy(model), "prompt": [list(ids) for ids in prompts], "n": n, "temperature": temperature,
            "top_p": 1.0, "top_k": 0, "max_tokens": max_new_tokens, "seed": seed % 2**31, "logprobs": 0,
            "return_token_ids": True,
        })  # fmt: skip
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])  # prompt by prompt
        ids = [choice["token_ids"] for choice in choices]
        logps = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return Samples(*([rows[i : i + n] for i in range(0, len(rows), n)] for rows in (ids, logps)))

    def _policy(self, model) -> str:
        digest = hashlib.sha256()
        for parameter in model.parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        name = f"policy-{digest.hexdigest()[:12]}"
        if name != self.name:
            model.save_pretrained(self.adapters / name)
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(self.adapters / name)})
            if self.name:
                self._post("unload_lora_adapter", {"lora_name": self.name})
            self.name = name
        return name

    def _post(self, path: str, body: dict):
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/{path}", data, kind)) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"vLLM: {path} answered {error.code}: {error.read().decode()[:500]}") from error
        except urllib.error.URLError as error:
            raise RuntimeError(f"vLLM: no server at {self.url} ({error.reason}); set VLLM_URL") from error
        return json.loads(text) if text.startswith("{") else text


sampler = VLLMSampler(os.environ.get("VLLM_URL", "http://localhost:8000"), os.environ.get("VLLM_ADAPTERS", "adapters"))
