"""A scorer as a server, to copy into the scorer's own environment: python reference_server.py --port 8901

It needs Pillow alone. Put your model into `score`, and say in VERSION which one it is. For ImageReward:
    model = ImageReward.load("ImageReward-v1.0")
    return [model.score(prompt, image) for prompt, image in zip(prompts, images)]
"""

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image, ImageStat

NAME, VERSION, TEMPERATURE = "brightness", "mean-1", 1.0


def score(prompts, images):
    """One number for each prompt and RGB image, higher is better. Yours goes here; this one is the mean pixel."""
    return [sum(ImageStat.Stat(image).mean) / 3 for image in images]


class Handler(BaseHTTPRequestHandler):
    """GET says what scores here, POST scores."""

    timeout = 60  # seconds that one client may keep the others waiting without a word

    def do_GET(self):
        self.answer({"name": NAME, "version": VERSION, "temperature": TEMPERATURE})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in asked["images"]]
        self.answer({"version": VERSION, "scores": [float(value) for value in score(asked["prompts"], images)]})

    def answer(self, said):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8901)
    HTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
