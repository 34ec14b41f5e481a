"""DPG-Bench: the CSV, the dependency rule in both modes, and the judges that answer."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from advdmd.evaluation import judging
from advdmd.evaluation.benchmark import ExcludedItem
from advdmd.evaluation.dpg import DPG, Question, apply_dependencies, read_csv
from advdmd.evaluation.generate import image_jobs, image_path
from advdmd.evaluation.judges import vqa
from tests.evaluation import tiny


@pytest.fixture
def csv(tmp_path):
    return str(tiny.save_dpg(tmp_path / "dpg.csv"))


def judgement(**answers):
    return {"answers": {k.strip("q"): float(v) for k, v in answers.items()}}


def test_questions_keep_their_ids_parents_and_kinds(csv):
    items = DPG(csv).items()
    assert [(i.id, i.prompt, i.n_images) for i in items] == [
        ("one", "A red cube on a table.", 4),
        ("two", "Two dogs, one barking.", 4),
    ]
    assert items[0].meta["questions"][3] == Question(4, "Is the cube on the table?", (1, 3), "relation - spatial")
    assert len(items[0].meta["csv"]) == 64


def test_a_failed_parent_takes_its_descendants_with_it(csv):
    suite = DPG(csv)
    one, two = suite.items()
    assert suite.verdict(one, judgement(q1=1, q2=1, q3=1, q4=1)).official == 1
    failed = suite.verdict(one, judgement(q1=0, q2=1, q3=1, q4=1))
    assert (failed.official, failed.strict) == (1 / 4, 0)
    assert "Is the cube red?" in failed.reason
    assert suite.verdict(two, judgement(q1=0, q2=1, q3=1)).official == 0, "grandchildren too"
    assert suite.verdict(two, judgement(q1=0.5, q2=0.51, q3=0.49)).official == pytest.approx(2 / 3), "yes from one half on"


def closure(parents, yes):
    """The dependency rule by reachability: a question holds if it and all its ancestors were answered yes."""

    def ancestors(i):
        found, todo = set(), list(parents[i])
        while todo:
            p = todo.pop()
            if p not in found:
                found.add(p)
                todo += parents[p]
        return found

    return {i: yes[i] and all(yes[a] for a in ancestors(i)) for i in parents}


def test_the_dependency_rule_agrees_with_reachability_on_random_graphs_in_any_order():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(1, 12))
        parents = {i: tuple(p for p in range(1, i) if rng.random() < 0.3) for i in range(1, n + 1)}
        questions = [Question(int(i), "", parents[int(i)], "x") for i in rng.permutation(n) + 1]
        yes = {i: bool(rng.random() < 0.7) for i in parents}
        assert apply_dependencies(questions, yes) == closure(parents, yes)


def test_official_arithmetic_has_the_published_scripts_defects(tmp_path):
    rows = [("a", "A.", 1, "0", "entity - whole (x)", "x?"), ("a", "A.", 2, "0", "entity - whole (y)", "y?")]
    rows += [("b", "B.", 2, "1", "attribute - color (z)", "red?"), ("b", "B.", 1, "0", "entity - whole (z)", "z?")]
    path = str(tiny.save_dpg(tmp_path / "d.csv", rows))
    fixed, official = DPG(path, 2), DPG(path, 2, "official")
    a, b = official.items()
    assert fixed.verdict(a, judgement(q1=0, q2=1)).official == 0.5
    assert official.verdict(a, judgement(q1=0, q2=1)).official == 1, "the first row of the file is lost"
    assert official.verdict(b, judgement(q1=0, q2=1)).official == 0
    first, last = (official.verdict(b, judgement(q1=0, q2=x)) for x in (0, 1))
    kinds = official.breakdown([b, b], [first, last])
    assert kinds["attribute"] == 1, "of the last image, before the rule"
    both = [fixed.verdict(b, judgement(q1=x, q2=1)) for x in (0, 1)]
    assert fixed.breakdown([b, b], both) == dict.fromkeys(("attribute", "attribute - color", "entity", "entity - whole"), 0.5)


def test_official_arithmetic_drops_a_first_prompt_whose_questions_depend_on_the_lost_row(csv):
    suite = DPG(csv, mode="official")
    with pytest.raises(ExcludedItem):
        suite.verdict(suite.items()[0], judgement(q1=1, q2=1, q3=1, q4=1))
    assert suite.verdict(suite.items()[1], judgement(q1=1, q2=1, q3=1)).official == 1
    for mode in ("fixed", "official"):  # an unanswered question is the judge's fault and leaves no mean silently
        with pytest.raises(KeyError):
            DPG(csv, mode=mode).verdict(suite.items()[1], judgement(q1=1, q2=1))


BAD = {
    "circle": ([("a", "A.", 1, "2", "e (x)", "?"), ("a", "A.", 2, "1", "e (x)", "?")], "circle"),
    "missing parent": ([("a", "A.", 1, "7", "e (x)", "?")], r"question 1 depends on \[7\]"),
    "twice": ([("a", "A.", 1, "0", "e (x)", "?"), ("a", "A.", 1, "0", "e (x)", "?")], "question 1 stands twice"),
    "parents": ([("a", "A.", 1, "one", "e (x)", "?")], r"line 2: dependency='one'"),
    "id": ([("a", "A.", "x", "0", "e (x)", "?")], r"line 2: proposition_id='x'"),
    "two prompts": ([("a", "A.", 1, "0", "e (x)", "?"), ("a", "B.", 2, "0", "e (x)", "?")], "line 3: a has another prompt"),
    "path": ([("../a", "A.", 1, "0", "e (x)", "?")], "names no file"),
    "nothing": ([], "holds no questions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_by_line_and_rule(name, tmp_path):
    rows, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        DPG(str(tiny.save_dpg(tmp_path / "d.csv", rows)))


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("item_id,text\n1,2\n")
    with pytest.raises(ValueError, match="no column proposition_id"):
        read_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.csv"):
        read_csv(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="not shipped"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="mode='best'"):
        DPG(str(tiny.save_dpg(tmp_path / "d.csv")), mode="best")  # type: ignore[arg-type]


def test_qwen_answers_with_a_probability_that_depends_on_picture_and_question(tmp_path, csv):
    judge = vqa.qwen_vl(tiny.save_qwen_vl(tmp_path / "Qwen3-VL-tiny"))
    assert judge.name == "qwen3-vl-tiny"
    red, blue = (Image.new("RGB", (64, 48), c) for c in ((224, 31, 31), (31, 31, 224)))
    found = [judge.answer(p, q) for p in (red, blue) for q in ("is there a cube?", "is it red?")]
    assert all(0 < p < 1 for p in found)
    assert len({round(p, 6) for p in found}) == 4
    assert judge.answer(red, "is it red?") == found[1]
    item = DPG(csv).items()[0]
    judged = judge.judge([item], [np.asarray(red)])[0]
    assert set(judged["answers"]) == {"1", "2", "3", "4"}
    assert json.loads(json.dumps(judged)) == judged


def test_probability_of_yes_is_over_distinct_first_tokens(tmp_path):
    """By hand: the same forward, its softmax summed over the two sets."""
    judge = vqa.qwen_vl(tiny.save_qwen_vl(tmp_path / "q")).answer
    yes, no = (set(t) for t in (judge.yes, judge.no))
    assert yes
    assert no
    assert not yes & no
    word = judge.tokenizer.decode
    assert all(word([i]).strip().lower().startswith("y") for i in yes)
    assert all(word([i]).strip().lower().startswith("n") for i in no)


WORKER = """
import json, sys
for line in sys.stdin:
    r = json.loads(line)
    print(json.dumps({"answer": {answer}}), flush=True)
"""


def test_a_worker_in_another_interpreter_answers_line_by_line(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("{answer}", '"Yes" if "red" in r["question"] and len(r["image"]) > 50 else "no"'))
    judge = vqa.VQAJudge("w", "f", vqa.JudgeProcess([sys.executable, str(script)]))
    judge.self_test()
    assert judge.answer(Image.new("RGB", (4, 4)), "is it blue?") == 0
    script.write_text("print('hello')")
    with pytest.raises(ValueError, match="gave no answer"):
        vqa.JudgeProcess([sys.executable, str(script)])(Image.new("RGB", (4, 4)), "?")
    with pytest.raises(ValueError, match="does not start"):
        vqa.JudgeProcess([str(tmp_path / "no-python")])(Image.new("RGB", (4, 4)), "?")
    script.write_text(WORKER.replace("{answer}", '"no"'))
    with pytest.raises(ValueError, match="self-test"):
        vqa.VQAJudge("w", "f", vqa.JudgeProcess([sys.executable, str(script)])).self_test()


def test_mplugs_worker_fails_with_one_error_where_modelscope_is_not_installed():
    """Here no interpreter has modelscope: the shipped script must fail with its name, not hang."""
    with pytest.raises(ValueError, match="exit status"):
        vqa.mplug(sys.executable).answer(Image.new("RGB", (4, 4)), "?")


@pytest.fixture
def server():
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), asked))
            question = asked["messages"][0]["content"][1]["text"]
            choice = {"message": {"content": "Maybe"}}
            if "red" in question:
                top = [{"token": "Yes", "logprob": -0.25}, {"token": " no", "logprob": -1.5}, {"token": "I", "logprob": -5}]
                choice["logprobs"] = {"content": [{"top_logprobs": top}]}
            elif "blue" in question:
                choice = {"message": {"content": "No."}}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", requests
    http.shutdown()
    http.server_close()


def test_an_endpoint_gets_openais_request_and_its_key_is_written_nowhere(server, monkeypatch):
    url, requests = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    judge = vqa.endpoint(url, "some-vl")
    picture = Image.new("RGB", (8, 8), "red")
    e = np.exp
    assert judge.answer(picture, "is it red?") == pytest.approx(e(-0.25) / (e(-0.25) + e(-1.5)))
    assert judge.answer(picture, "is it blue?") == 0
    judge.self_test()
    path, key, asked = requests[0]
    assert (path, key, asked["model"]) == ("/v1/chat/completions", "Bearer secret-123", "some-vl")
    assert asked["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "secret" not in judge.name + judge.fingerprint
    with pytest.raises(ValueError, match=r"answered 'maybe', not yes or no"):
        judge.answer(picture, "?")
    with pytest.raises(ValueError, match="gave no answer"):
        vqa.endpoint("http://127.0.0.1:9/v1", "m").answer(picture, "?")
    with pytest.raises(ValueError, match="an address such as"):
        vqa.endpoint("localhost:8000", "m")


def test_official_arithmetic_drops_a_first_prompt_that_had_one_question(tmp_path):
    """The script loses the only row, does not know the prompt, and leaves it out."""
    rows = [("a", "A.", 1, "0", "entity - whole (x)", "x?"), ("b", "B.", 1, "0", "entity - whole (z)", "z?")]
    suite = DPG(str(tiny.save_dpg(tmp_path / "d.csv", rows)), 1, "official")
    first, second = suite.items()
    with pytest.raises(ExcludedItem):
        suite.verdict(first, judgement(q1=1))
    assert suite.verdict(second, judgement(q1=1)).official == 1


def test_official_arithmetic_does_not_look_for_a_lost_parent_after_a_failed_one(tmp_path):
    """Parents are looked up in their order until one has failed; also those of a question that was answered no."""
    kinds = "entity - whole (x)"
    rows = [("a", "A.", n, parents, kinds, f"{n}?") for n, parents in ((1, "0"), (2, "0"), (3, "2,1"), (4, "1,2"))]
    suite = DPG(str(tiny.save_dpg(tmp_path / "d.csv", rows[:3])), 1, "official")
    (item,) = suite.items()
    assert suite.verdict(item, judgement(q1=1, q2=0, q3=1)).official == 0
    for answers in (judgement(q1=1, q2=1, q3=1), judgement(q1=1, q2=1, q3=0)):
        with pytest.raises(ExcludedItem):
            suite.verdict(item, answers)
    other = DPG(str(tiny.save_dpg(tmp_path / "e.csv", [*rows[:2], rows[3]])), 1, "official")
    with pytest.raises(ExcludedItem):
        other.verdict(other.items()[0], judgement(q1=1, q2=0, q4=1))


def test_a_prompt_that_fails_at_one_image_is_left_out_with_all_of_them(tmp_path):
    """The published script drops a prompt at the first image that fails."""
    kinds = "entity - whole (x)"
    rows = [("a", "A.", n, parents, kinds, f"{n}?") for n, parents in ((1, "0"), (2, "0"), (3, "2,1"))]
    rows += [("b", "B.", 1, "0", kinds, "b?")]
    suite = DPG(str(tiny.save_dpg(tmp_path / "d.csv", rows)), 2, "official")

    class AnswersByBrightness:
        name, fingerprint, batch = "says", "1", 1

        def self_test(self):
            pass

        def judge(self, items, images):
            dark = images[0].max() == 0
            return [{"answers": {"1": 1.0, "2": float(dark), "3": 1.0}} for _ in items]

    for item, k in image_jobs(suite):
        path = image_path(tmp_path, item, k)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "black" if k else "white").save(path)
    judging.run_judge(suite, tmp_path, AnswersByBrightness())
    found = judging.compute_verdicts(suite, tmp_path, AnswersByBrightness(), 0)
    assert ([(r["item"], r["k"]) for r in found.rows], found.excluded) == ([("b", 0), ("b", 1)], 2)
