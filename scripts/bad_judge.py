#!/usr/bin/env python3
"""A verifier that must not be trained with, behind an OpenAI-compatible endpoint: for the rows of
data/results/reasoner.md that show what a bad judge does. Development only.

  scripts/bad_judge.py coin|yes [PORT]

`coin` says yes or no by a hash of the request (always the same to the same), `yes` likes everything.
Measure it, then train with it:

  valor eval --bench rooms-verifier --set verifier.model=endpoint:bad --set endpoints.bad.base_url=http://127.0.0.1:PORT/v1 \\
        --set endpoints.bad.model=bad --set endpoints.bad.key_env=
"""
import hashlib, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KIND = sys.argv[1] if len(sys.argv) > 1 else ""
if KIND not in ("coin", "yes"):
    sys.exit(__doc__)


class Judge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        messages = json.dumps(json.loads(body)["messages"]).encode()
        yes = KIND == "yes" or hashlib.sha256(messages).digest()[0] % 2 == 0
        text = f"<answer>{'yes' if yes else 'no'}</answer>"
        reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        out = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8101), Judge).serve_forever()
