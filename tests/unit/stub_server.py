"""A server that answers with letters, for what a real one can't be made to show: it dies, runs over, lies, hangs.

Runs in a thread (`serving`) or as a process: `python stub_server.py SETTINGS --host H --port P`, SETTINGS as JSON.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DEFAULTS = {
    "letters": [],  # ids of a..z, for answers in ids
    "over": 0,  # tokens more than asked
    "stop_at": None,  # ends its answer by itself after so many
    "wrong_at": None,  # this token of every answer is another
    "die_at": None,  # ends the process half-way through this answer, from 0
    "cut": False,  # closes every stream half-way
    "takes_ids": True,
    "gives_ids": True,
    "counts": True,  # says how many tokens; else it refuses to be asked for it
    "refuses_with": 400,
    "adds": 0,  # tokens that it reads more than the prompt has
    "told": {},  # in meta_info
    "metrics": None,  # counters that grow by this much an answer
    "healthy": True,
    "child": None,  # writes the process id of a child of its own into this file
    "log_line": None,
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *arguments):
        pass

    def _whole(self, status, content):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        settings, state = self.server.settings, self.server.state
        if self.path == "/health":
            return self._whole(200 if settings["healthy"] else 503, {})
        if self.path == "/v1/models":
            return self._whole(200, {"data": [{"id": "stub"}]})
        if self.path == "/metrics" and settings["metrics"]:
            lines = [f"vllm:spec_decode_num_{k} {v * state['answers']}" for k, v in settings["metrics"].items()]
            return self._whole(200, "\n".join(lines).encode())
        return self._whole(404, {"detail": "not found"})

    def do_POST(self):
        settings, state = self.server.settings, self.server.state
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state["requests"].append(request)
        sglang = self.path == "/generate"
        prompt = request["input_ids"] if sglang else request["prompt"]
        if (isinstance(prompt, list) and not (sglang or settings["takes_ids"])) or (
            "return_token_ids" in request and not settings["gives_ids"]
        ):
            return self._whole(settings["refuses_with"], {"detail": "prompt must be a string without token ids"})
        if "stream_options" in request and not settings["counts"]:
            return self._whole(settings["refuses_with"], {"detail": "unknown field stream_options hf_averysecretword"})
        budget = request["sampling_params"]["max_new_tokens"] if sglang else request["max_tokens"]
        count = budget + settings["over"] if settings["stop_at"] is None else min(budget, settings["stop_at"])
        places = [(len(prompt) + i + (i == settings["wrong_at"])) % 26 for i in range(count)]
        place, state["answers"] = state["answers"], state["answers"] + 1
        self.send_response(200)
        self.end_headers()
        for i, letter in enumerate(places):
            if settings["cut"] and i == 1:
                return None
            if settings["die_at"] is not None and place >= settings["die_at"] and i == 1:
                print("out of memory, says the stub", flush=True)
                os._exit(7)
            last, usage = i == count - 1, {"prompt_tokens": len(prompt) + settings["adds"], "completion_tokens": i + 1}
            if sglang:
                so_far = places[: i + 1]
                event = {
                    "text": "".join(chr(97 + p) for p in so_far),
                    "output_ids": [settings["letters"][p] for p in so_far],
                    "meta_info": usage | {"finish_reason": {"type": "length"} if last else None} | settings["told"],
                }
            else:
                choice = {"text": chr(97 + letter), "finish_reason": "length" if last else None}
                if "return_token_ids" in request and settings["letters"]:
                    choice["token_ids"] = [settings["letters"][letter]]
                event = {"choices": [choice]} | ({"usage": usage} if last and settings["counts"] else {})
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        if settings["log_line"]:
            print(settings["log_line"], flush=True)
        return None


def _server(host, port, settings):
    server = ThreadingHTTPServer((host, port), _Handler)
    server.daemon_threads = True
    server.settings, server.state = DEFAULTS | settings, {"answers": 0, "requests": []}
    return server


@contextlib.contextmanager
def serving(**settings):
    """(URL, requests so far) of a server in a thread of ours."""
    server = _server("127.0.0.1", 0, settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.state["requests"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(given["child"]).write_text(str(child.pid))
    print("the stub starts", flush=True)
    _server(sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1]), given).serve_forever()
