"""mPLUG as a worker: run by an interpreter that has modelscope, never imported by the package.

Usage: PYTHON mplug_worker.py MODEL. Reads {"image": PNG in base64, "question": text} a line, writes {"answer": text} a line.
"""

import base64
import io
import json
import sys


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # the model's own chatter must not look like an answer

    from modelscope.pipelines import pipeline  # type: ignore[import-not-found]
    from modelscope.utils.constant import Tasks  # type: ignore[import-not-found]
    from PIL import Image

    ask = pipeline(Tasks.visual_question_answering, model=sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
        found = ask({"image": image, "question": request["question"]})
        answers.write(json.dumps({"answer": found["text"]}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
