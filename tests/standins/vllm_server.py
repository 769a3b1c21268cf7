"""A stand-in for a vLLM server: it computes with the weights that it was told to load, one token after the other."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from components.models import load_policy


class VllmServer:
    """Stands in for vLLM, with the weights it was told to load; `changed` alters answers before they are sent."""

    def __init__(self, policy: Path) -> None:
        self.model, self.version, self.paused, self.loaded = load_policy(policy), "default", False, 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[str | None] = []
        self.changed: dict[str, Callable[[Any], Any]] = {}
        self.failing: dict[str, list[int]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.answer(json.loads(body) if body else {})

            def answer(self, body: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                server.headers.append(self.headers["Authorization"])
                if server.failing.get(path):
                    status, content = server.failing[path].pop(0), {"error": f"no: {self.headers['Authorization']}"}
                else:
                    status, content = 200, server.reply(path, self.path, body)
                encoded = json.dumps(server.changed.get(path, lambda same: same)(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        """The server while it answers."""
        thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield self
        self.http.shutdown()
        self.http.server_close()
        thread.join()

    def reply(self, path: str, address: str, body: dict[str, Any]) -> Any:
        self.asked.append((address, body))
        match path:
            case "/v1/models":
                return {"data": [{"id": "tiny", "parent": None, "max_model_len": 64}]}
            case "/pause" | "/resume":
                self.paused = path == "/pause"
            case "/collective_rpc" if body["method"] == "reload_weights":
                assert self.paused
                self.load(Path(body["kwargs"]["weights_path"]))
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/weight_info":
                return {"weight_version": self.version}
            case "/v1/completions":
                assert not self.paused
                return self.completions(body)
        return {}

    def load(self, folder: Path) -> None:
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118
        self.loaded += 1

    @torch.no_grad()
    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index in range(body["n"]):
            generator = torch.Generator().manual_seed(body["seed"] % 2**31 + index)
            ids, logprobs = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([ids])).logits[0, -1] / body["temperature"]
                if allowed := body.get("allowed_token_ids"):
                    outside = torch.ones_like(logits, dtype=torch.bool)
                    outside[allowed] = False
                    logits = logits.masked_fill(outside, float("-inf"))
                chances = logits.log_softmax(-1)
                ids.append(int(torch.multinomial(chances.exp(), 1, generator=generator)))
                logprobs.append(float(chances[ids[-1]]))
                if ids[-1] in body["stop_token_ids"]:
                    break
            new = ids[len(body["prompt"]) :]
            reason = "stop" if new[-1] in body["stop_token_ids"] else "length"
            choice = {"index": index, "token_ids": new, "finish_reason": reason}
            choice |= {"logprobs": {"token_logprobs": logprobs}}
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = self.prompt_logprobs(body["prompt"])
            choices.append(choice)
        return {"choices": choices[::-1]}  # in whatever order

    def prompt_logprobs(self, prompt: list[int]) -> list[Any]:
        chances = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        following = zip(prompt[1:], chances[:-1], strict=True)
        return [None, *({str(token): {"logprob": float(row[token])}} for token, row in following)]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for address, body in self.asked if address.startswith(path)]
