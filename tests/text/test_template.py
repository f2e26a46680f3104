"""A template renders as Hugging Face's libraries render it, and can neither run code nor stall nor fill the memory (X2)."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.text.template import WORKER, InvalidConversation, Template

ASKED = [{"role": "user", "content": "hi"}]


def render(template: Template, messages: list[dict[str, str]] = ASKED, prompt: bool = False) -> str:
    return template.render([(messages, prompt)])[0]


@pytest.fixture(scope="module")
def chatml():
    source = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    return Template(source + "{% if add_generation_prompt %}<assistant>{% endif %}", {"eos_token": "</s>"})


def test_messages_and_variables(chatml):
    assert render(chatml) == "<user>hi</s>\n"
    assert render(chatml, prompt=True) == "<user>hi</s>\n<assistant>"
    odd = "a\ud7ff\U0001f600\x00\u2028\n\"'\\ {{ 7 * 7 }}{% raw %}"
    assert render(chatml, [{"role": "user", "content": odd}]) == f"<user>{odd}</s>\n"


def test_many_at_once_are_each_alone(chatml):
    jobs = [([{"role": "user", "content": str(n)}], n % 2 == 0) for n in range(70)]
    assert chatml.render(jobs) == [render(chatml, *job) for job in jobs]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),  # trim_blocks and lstrip_blocks
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),  # not escaped for HTML
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2026"),
        ("{% if tools is not none or documents is not none %}x{% endif %}", ""),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% "
            "endfor %}{{ ns.n }}",
            "1",
        ),
    ],
)
def test_what_templates_rely_on(source, text):
    assert render(Template(source)) == text


GROW = "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
NEST = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for i in range(99999) %}{% for i in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.law("hostile files")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        LOOPS,
        "{{ 'a' * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        GROW,
        NEST + "{{ ns.x }}",  # one call into C that would take years
        NEST + "{{ ns.x == [ns.x] }}{{ ns.x | tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}",
        "{{ ('a' * 999999) ~ 'aa' }}",
    ],
)
def test_no_template_stalls_or_fills_the_memory(source):
    """It computes for two seconds at most."""
    gc.collect()  # so that the processes of other templates have ended
    template = Template(source)
    begin = sum(os.times()[2:4])  # of processes that have ended
    with pytest.raises(UserError, match=r"The chat template (ran|failed|needed|wrote|calls)"):
        render(template)
    template.close()
    assert sum(os.times()[2:4]) - begin < 2


@pytest.mark.law("hostile files")
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{{ strftime_now.__self__.__class__.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages | map(attribute='__class__') | map(attribute='__base__') | first }}{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(n=10**9) }}",
        "{{ (messages | attr('__class__')).mro() }}",
    ],
)
def test_no_template_runs_code(source):
    with pytest.raises(UserError):
        render(Template(source))


def test_memory_is_bounded_by_the_kernel_and_not_by_what_there_is():
    template = Template("{{ ('a' * (10**9 if messages else 1)) | length }}")
    assert render(template, []) == "1"
    with pytest.raises(UserError, match="The chat template needed too much memory"):
        render(template)


def test_a_template_that_got_out_of_the_sandbox_could_still_open_nothing():
    # `eval` of a code object is itself an `exec` event, so each attempt is refused at its first
    # move.
    program = f"""
import runpy
attempts = ("open('/etc/passwd')", "__import__('antigravity')", "__import__('os').system('true')", "exec('1')")
compiled = [compile(attempt, '', 'eval') for attempt in attempts]
runpy.run_path({str(WORKER)!r})["forbid_system_access"]()
for attempt in compiled:
    try:
        eval(attempt)
    except PermissionError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.count("it tried to use") == 4, result.stderr


def test_what_the_template_itself_refuses():
    template = Template(
        "{% if messages | length > 1 %}{{ raise_exception('one\x1b[31m only') }}{% endif %}ok"
    )
    assert render(template) == "ok"
    with pytest.raises(InvalidConversation, match=r"refuses it: one \[31m only"):
        render(template, ASKED * 2)
    assert render(template) == "ok"  # the process is still there


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", ["TemplateSyntaxError", "line 2"]),
        ("{{ nothing.at.all }}", ["UndefinedError", "'nothing' is undefined"]),
        ("{{ messages | no_such_filter }}", ["no_such_filter"]),
    ],
)
def test_what_is_wrong_is_said(source, words):
    with pytest.raises(UserError) as caught:
        render(Template(source))
    assert not isinstance(caught.value, InvalidConversation)
    for word in words:
        assert word in str(caught.value)


def test_after_a_stalled_one_the_next_is_answered():
    template = Template("{% if messages | length > 1 %}" + LOOPS + "{% endif %}ok")
    with pytest.raises(UserError, match="more than a second"):
        render(template, ASKED * 2)
    assert render(template) == "ok"


def test_processes_end_with_their_template():
    template = Template("ok")
    render(template)
    process = template.process
    assert process is not None
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


def test_a_worker_left_alone_ends():
    """Also when whoever started it was killed: its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    start = {
        "path": [p for p in sys.path if p],
        "source": "ok",
        "variables": {},
        "now": "2026-01-01T00:00:00",
    }
    process.stdin.write(json.dumps(start).encode() + b"\n")
    process.stdin.close()
    assert process.wait(timeout=300) == 0
    assert process.stdout is not None
    process.stdout.close()


def test_the_environment_of_the_user_is_not_the_templates(monkeypatch):
    monkeypatch.setenv("PYTHONSTARTUP", "/nonexistent")
    monkeypatch.setenv("SECRET_KEY", "abc")
    template = Template("ok")
    render(template)
    assert template.process is not None
    environment = Path(f"/proc/{template.process.pid}/environ")
    assert not environment.exists() or b"SECRET_KEY" not in environment.read_bytes()
    template.close()
