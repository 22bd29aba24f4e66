"""The web page in a real Chromium, against the real server in its own process.
`python tests/test_web.py` writes the hashes of the style and the script into the page's content security policy."""
import base64, hashlib, json, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import fresh, pytest
from tiny_run import environ, talker

PAGE = Path(__file__).resolve().parent.parent/'nano_dh'/'web'/'index.html'
CHROMIUM = shutil.which('chromium')
try: from playwright.sync_api import expect, sync_playwright
except ImportError: sync_playwright = None
browsing = pytest.mark.skipif(not (CHROMIUM and sync_playwright), reason='needs chromium and the playwright package')
LONG = 4000     # tokens of an answer that is left in the middle
MARKUP = 'x <img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> <b onmouseover=alert(1)>bold</b> &amp;'

# ---- the file itself

def policy(html): # the page with the hashes of its style and script
    for tag in ('style', 'script'):
        inside = re.search(rf'<{tag}(?: type="module")?>(.*?)</{tag}>', html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        html = re.sub(rf"({tag}-src .*?)'sha256-[^']*'", rf"\1'sha256-{digest}'", html)
    def pinned(m): return f'{m[1]}"sha384-{base64.b64encode(hashlib.sha384((PAGE.parent.parent/m[2]).read_bytes()).digest()).decode()}"'
    return re.sub(r'((?:src|href)="(web/[^"]+)" integrity=)"[^"]*"', pinned, html)

def test_policy_is_strict_and_up_to_date():
    html = PAGE.read_text()
    assert policy(html) == html, 'the page was changed: python tests/test_web.py'
    csp = dict(d.strip().split(' ', 1) for d in re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].split(';'))
    assert csp['default-src'] == csp['base-uri'] == csp['form-action'] == "'none'" and csp['connect-src'] == "'self'"
    assert csp['trusted-types'] == 'dompurify' and csp['require-trusted-types-for'] == "'script'" and 'unsafe' not in str(csp) and '*' not in str(csp)

def test_asks_nobody_else():
    html = PAGE.read_text()
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc', html)
    assert not re.search(r'\son\w+="|\sstyle="|<(img|iframe)[^>]*(src|href)="(?!data:)', html)
    assert set(re.findall(r'https?://[^\s\'"]+', html)) == {'http://www.w3.org/2000/svg'}      # a name, not an address
    asked = re.findall(r'<(?:link|script)[^>]*(?:src|href)="(?!data:)([^"]*)" integrity="sha384-.{64}"', html)
    assert len(asked) == 4 == len(re.findall(r'<(?:link|script)[^>]*(?:src|href)="(?!data:)', html))
    files = {f'web/{p.name}' for p in PAGE.parent.iterdir()} - {'web/index.html'}
    assert files == {*asked, 'web/Temml.woff2'}                                 # the style's font

def test_libraries_are_named_and_licensed():
    root = PAGE.parent.parent.parent
    said = (root/'ATTRIBUTION.md').read_text()
    for p in PAGE.parent.iterdir():
        if p.suffix == '.html': continue
        name = p.stem.partition('-')[0].lower()
        assert f'`nano_dh/web/{p.name}`' in said and f'licenses/{name}.txt' in said and (root/'licenses'/f'{name}.txt').stat().st_size > 500

# ---- a server and a browser

def checkpoint(base):
    from nano_dh.checkpoint import save_checkpoint
    from nano_dh.tokenizer import Tokenizer
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    return save_checkpoint(Path(base)/'runs'/'tiny', 0, talker(tok.vocab_size, sequence_len=8192), tokenizer=tok,
                           meta=dict(train=dict(stage='sft', total_batch_size=256)))

@contextmanager
def serving(base, port=None): # -> its address
    if port is None:
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    log = open(Path(base)/'server.log', 'a')
    p = fresh.Popen([sys.executable, '-m', 'nano_dh.serve', '--port', str(port)], env=environ(base), stdout=log, stderr=log)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f'{url}/health', timeout=1); break
            except OSError: assert p.poll() is None, Path(log.name).read_text()[-2000:]; time.sleep(.1)
        else: pytest.fail('the server did not answer in 30 s')
        yield url
    finally: p.terminate(); p.wait(20); log.close()

@pytest.fixture(scope='module')
def base(tmp_path_factory): d = tmp_path_factory.mktemp('web'); checkpoint(d); return d
@pytest.fixture(scope='module')
def url(base):
    with serving(base) as u: yield u

@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture
def page(browser, url): # whatever goes wrong in the page fails the test
    context = browser.new_context(viewport=dict(width=1280, height=800), reduced_motion='reduce')
    context.set_default_timeout(8000)
    p, wrong = context.new_page(), []
    p.on('pageerror', lambda e: wrong.append(str(e)))
    p.on('dialog', lambda d: (wrong.append(f'dialog {d.message}'), d.dismiss()))
    p.on('console', lambda m: wrong.append(m.text) if m.type == 'error' and not re.search('Failed to load resource|TrustedHTML', m.text) else None)
    p.on('request', lambda r: wrong.append(f'asks {r.url}') if not r.url.startswith(('http://127.0.0.1:', 'data:', 'blob:')) else None)
    p.goto(url)
    yield p
    assert not p.is_closed() and p.evaluate('window.hacked') is None
    context.close()
    assert not wrong, wrong

# ---- what a person does

def box(page): return page.get_by_label('Message', exact=True)
def say(page, text): box(page).fill(text); box(page).press('Enter')
def done(page): expect(page.locator('#send')).to_be_visible(); expect(page.locator('article.assistant .foot').last).to_be_visible()
def ask(page, text, **settings):
    if settings: sample(page, **settings)
    say(page, text); done(page)
def sample(page, system=None, **kw):
    page.get_by_role('button', name='Settings').click()
    if system is not None: page.get_by_label('System prompt').fill(system)
    for k, v in kw.items(): page.locator(f'[name={k}]').fill(str(v))
    page.keyboard.press('Escape')
def until(page, ok):
    for _ in range(300):
        if ok(): return
        page.wait_for_timeout(20)
    pytest.fail('waited in vain')
def words(page): return [a.locator('.body').inner_text() for a in page.locator('article').all()]
def sent(page, act): # the request that follows
    with page.expect_request('**/v1/chat/completions') as r: act()
    return r.value.post_data_json

def events(*deltas, usage=None, error=None, end=True): # what a server streams
    out = [dict(choices=[dict(index=0, delta=d)]) for d in deltas]
    if error: out.append(dict(error=dict(message=error)))
    if usage: out.append(dict(choices=[], usage=usage))
    return ''.join(f'data: {json.dumps(o)}\n\n' for o in out) + 'data: [DONE]\n\n'*end
def script(page, *replies): # the next answers come from here: dicts of route.fulfill
    left = list(replies)
    page.route('**/v1/chat/completions', lambda r: r.fulfill(**{'content_type': 'text/event-stream', **left.pop(0)}))
    return left
def looks(page, tmp_path, name): page.screenshot(path=tmp_path/f'{name}.png'); assert (tmp_path/f'{name}.png').stat().st_size > 5000

@browsing
def test_send_and_stream(page, tmp_path):
    page.evaluate('''() => { window.seen = []; new MutationObserver(() => { const b = document.querySelector('.assistant .body.busy');
        if (b) seen.push(b.textContent.length); }).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true}) }''')
    sample(page, max_tokens=800, system='Be brief.', seed=1)
    body = sent(page, lambda: say(page, 'Tell me'))
    assert body['messages'] == [dict(role='system', content='Be brief.'), dict(role='user', content='Tell me')] and body['max_tokens'] == 800
    done(page)
    seen = page.evaluate('seen')
    assert len(set(seen)) > 3 and seen[0] < seen[-1]                          # it grew while it was written
    assert all(b >= a - 4 for a, b in zip(seen, seen[1:]))                     # marks that close, such as **, are not shown any more
    assert words(page)[0] == 'Tell me' and len(words(page)[1]) > 100
    expect(page.locator('.facts')).to_contain_text(re.compile(r'800 tokens · [\d.]+ tokens/s'))
    expect(page.locator('#context')).to_contain_text(re.compile(r'Context \d+'))
    looks(page, tmp_path, 'desktop')

@browsing
def test_stop(page, url):
    sample(page, max_tokens=LONG)
    say(page, 'On and on')
    expect(page.locator('.assistant .body')).not_to_be_empty()
    page.get_by_role('button', name='Stop').click()
    done(page)
    got = words(page)[1]
    expect(page.locator('.facts')).to_have_text('stopped')
    page.wait_for_timeout(200)
    assert words(page)[1] == got and 0 < len(got) < LONG
    ask(page, 'And then?', max_tokens=5)                                        # goes on from what was said
    assert len(words(page)) == 4

@browsing
def test_regenerate(page):
    ask(page, 'Once', max_tokens=40)
    first = words(page)
    page.get_by_role('button', name='Regenerate').click(); done(page)
    second = words(page)
    assert len(second) == 2 and second[0] == 'Once' and second[1] != first[1]   # a new seed
    ask(page, 'Twice', seed=7)
    third = words(page)
    page.get_by_role('button', name='Regenerate').click(); done(page)
    assert words(page) == third and len(third) == 4                             # the same seed

@browsing
def test_regenerate_says_why_it_repeats(page):
    note = page.locator('.remembered')
    ask(page, 'Once', max_tokens=20, seed=7); before = words(page)
    page.get_by_role('button', name='Regenerate').click(); done(page)
    expect(note).to_contain_text('the seed is 7, and the same seed gives the same answer')
    sample(page, seed='', temperature=0); page.get_by_role('button', name='Regenerate').click(); done(page)
    expect(note).to_have_count(0); assert words(page)[1] != before[1]
    page.get_by_role('button', name='Regenerate').click(); done(page)
    expect(note).to_contain_text('temperature 0 always takes the likeliest token')
    expect(page.locator('.foot')).to_contain_text(['', '2 of 2'])               # a repetition is no version

@browsing
def test_answer_versions(page, tmp_path):
    script(page, *[dict(body=events(dict(content=f'Answer {i}.'))) for i in 'abc'], dict(status=503, body='{}'), dict(body=events(dict(content='Go on.'))))
    ask(page, 'Which?')
    for i in 'bc': page.get_by_role('button', name='Regenerate').click(); done(page); assert words(page) == ['Which?', f'Answer {i}.']
    back, on = page.get_by_role('button', name='Answer before'), page.get_by_role('button', name='Answer after')
    assert on.is_disabled(); back.click(); back.click(); assert back.is_disabled() and words(page)[1] == 'Answer a.'
    on.click(); looks(page, tmp_path, 'versions')
    page.reload(); assert words(page)[1] == 'Answer b.'
    page.get_by_role('button', name='Regenerate').click()                       # fails: nothing of the others is lost
    expect(page.locator('.problem')).to_be_visible(); expect(page.locator('.foot').last).to_contain_text('4 of 4')
    back.click(); assert words(page)[1] == 'Answer c.'; back.click()
    expect(page.locator('.foot').last).to_contain_text('2 of 3'); expect(page.locator('.problem')).to_have_count(0)
    body = sent(page, lambda: say(page, 'And?')); done(page)
    assert [m['content'] for m in body['messages']] == ['Which?', 'Answer b.', 'And?']   # what is shown is what the model reads

@browsing
def test_failed_regenerate_gives_way(page):
    script(page, dict(body=events(dict(content='Good.'))), dict(status=503, body='{}'), dict(body=events(dict(content='On.'))))
    ask(page, 'One'); page.get_by_role('button', name='Regenerate').click(); expect(page.locator('.problem')).to_be_visible()
    body = sent(page, lambda: say(page, 'Two')); done(page)
    assert [m['content'] for m in body['messages']] == ['One', 'Good.', 'Two']

@browsing
def test_continue(page):
    more = page.get_by_role('button', name='Continue', exact=True)
    ask(page, 'Tell me', max_tokens=6, temperature=0); first = words(page)[1]
    expect(page.locator('.facts')).to_contain_text('cut at the longest answer')
    body = sent(page, lambda: more.click()); done(page)
    assert body['messages'][-1]['role'] == 'assistant' and len(words(page)) == 2
    both = words(page)[1]; assert both.startswith(first) and len(both) > len(first)
    expect(page.locator('.facts')).to_contain_text('12 tokens')
    page.get_by_role('button', name='New chat').click(); ask(page, 'Tell me', max_tokens=12)
    assert words(page)[1] == both                                               # as if it had never been cut
    page.unroute_all()
    script(page, dict(body=events(dict(content='Half'), end=False)), dict(body=events(dict(content=' and half.'))))
    page.get_by_role('button', name='New chat').click(); say(page, 'Well?')
    expect(page.locator('.problem')).to_contain_text('broke in the middle')
    more.click(); done(page); assert words(page)[1] == 'Half and half.'
    expect(page.locator('.problem')).to_have_count(0); expect(more).to_have_count(0)

@browsing
def test_edit(page):
    sample(page, max_tokens=10)
    for t in ('first', 'second'): ask(page, t)
    page.locator('article.user').first.hover()
    page.get_by_role('button', name='Edit').first.click()
    expect(page.get_by_label('Edit the message')).to_be_focused()
    page.get_by_label('Edit the message').fill('changed')
    body = sent(page, lambda: page.locator('.edit').get_by_role('button', name='Send').click())
    done(page)
    assert [m['content'] for m in body['messages']] == ['changed'] and len(words(page)) == 2 and words(page)[0] == 'changed'
    expect(page.locator('#title')).to_have_text('changed')

@browsing
def test_reload_and_several_chats(page):
    sample(page, max_tokens=10, system='Here only.')
    ask(page, 'One chat'); one = words(page)
    page.get_by_role('button', name='New chat').click()
    expect(page.locator('article')).to_have_count(0)
    ask(page, 'Another chat', system=''); other = words(page)
    page.reload()
    expect(page.locator('article')).to_have_count(2)
    assert words(page) == other and page.locator('[name=max_tokens]').input_value() == '10'
    page.locator('#chats').get_by_text('One chat').click()
    assert words(page) == one and page.locator('#system').input_value() == 'Here only.'
    page.reload()
    expect(page.locator('#title')).to_have_text('One chat')                     # the one that was open

@browsing
def test_reload_in_the_middle(page):
    sample(page, max_tokens=LONG)
    say(page, 'Long')
    expect(page.locator('.assistant .body')).to_have_text(re.compile('.{20}', re.S))
    page.reload()
    expect(page.locator('.facts')).to_have_text('stopped')
    assert len(words(page)[1]) > 10
    expect(page.get_by_role('button', name='Regenerate')).to_be_visible()

@browsing
def test_dark_mode(page, tmp_path):
    ask(page, 'Night', max_tokens=60)
    shade = lambda: sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))
    toggle = page.get_by_role('button', name='Dark mode')
    assert shade() > 600
    page.emulate_media(color_scheme='dark'); assert shade() < 150
    expect(toggle).to_have_attribute('aria-pressed', 'true')
    looks(page, tmp_path, 'desktop-dark')
    toggle.click(); assert shade() > 600
    page.reload(); assert shade() > 600                                         # remembered against the system
    toggle.click(); page.reload(); assert shade() < 150
    page.emulate_media(color_scheme='light'); assert shade() > 600              # and follows it again

@browsing
def test_markup_stays_text(page):
    ask(page, MARKUP, max_tokens=5)                                             # from the user, through the real server
    assert words(page)[0] == MARKUP
    fence = f'```html\n{MARKUP}\n```'
    script(page, dict(body=events(*[dict(content=c) for c in MARKUP], dict(content=f'\n\n**{MARKUP}** `{MARKUP}`\n{fence}'),
                                  dict(nano_dh=dict(part='python', text=MARKUP)), dict(nano_dh=dict(part='output', text=MARKUP)), error=MARKUP)))
    ask(page, f'{MARKUP} again')                                                # from the model: text, code, tool, error
    a = page.locator('article.assistant').last
    assert a.locator('p').first.inner_text() == MARKUP
    assert [x.inner_text() for x in a.locator('pre').all()] == [MARKUP]*3
    expect(a.locator('.problem')).to_contain_text(MARKUP)
    page.reload()
    assert words(page)[0] == MARKUP                                             # from storage
    for t in ('img', 'script', 'b', 'iframe'): assert page.locator(f'main {t}').count() == 0
    with pytest.raises(Exception, match='TrustedHTML|Trusted'): page.evaluate("document.body.innerHTML = '<img src=x>'")

DOCUMENT = r"""# A heading

Some *emphasis*, **strong**, ~~gone~~, `code` and a [link](https://example.org/a "there").
A second line, it costs $5 or $10.

## Lists

1. one
   - within
   - [x] done
2. two

| name | value |
|:-----|------:|
| a    |     1 |
| b    |  `2`  |

> quoted

The sum $\sum_{i=1}^n i = \frac{n(n+1)}{2}$ and \(e^{i\pi} = -1\), shown:

$$\int_0^1 x^2\,dx = \tfrac13$$

\[ \begin{pmatrix} a & b \\ c & d \end{pmatrix} \]

---

```python
def f(x):
    return x**2
```

Not mathematics: $\nosuch{x}$. See [1].

[1]: https://example.org/ref
"""

@browsing
def test_markdown_whole(page, tmp_path):
    script(page, *[dict(body=events(*[dict(content=DOCUMENT[i:i + 7]) for i in range(0, len(DOCUMENT), 7)]))]*2)
    ask(page, DOCUMENT)
    a, n = page.locator('.assistant .body'), lambda css: page.locator(f'.assistant .body {css}').count()
    assert [n(t) for t in ('h1', 'h2', 'ol > li', 'ul > li', 'table', 'td', 'blockquote', 'hr', 'em', 'strong', 'del')] == \
        [1, 1, 2, 2, 1, 4, 1, 1, 1, 1, 1]
    assert n('math') == 4 and n('mfrac') == 2 and n('mtable') == 1 and n('math[display=block]') == 2
    tops = [a.locator('math[display=block]').nth(i).bounding_box() for i in (0, 1)]
    assert tops[1]['y'] >= tops[0]['y'] + tops[0]['height']                     # shown: each on its own line
    assert '$5 or $10' in a.inner_text() and r'$\nosuch{x}$' in a.inner_text() and '☑ done' in a.inner_text()
    assert a.locator('td').nth(1).get_attribute('align') == 'right'
    links = [(x.get_attribute('href'), x.get_attribute('rel'), x.get_attribute('target')) for x in a.locator('a').all()]
    assert links == [(u, 'noopener noreferrer', '_blank') for u in ('https://example.org/a', 'https://example.org/ref')]
    assert a.locator('figure.code pre').inner_text() == 'def f(x):\n    return x**2'
    assert page.locator('.user h1, .user math').count() == 0                    # what a person writes is shown as it was written
    before = a.inner_html(); page.reload(); assert a.inner_html() == before
    looks(page, tmp_path, 'markdown'); page.emulate_media(color_scheme='dark'); looks(page, tmp_path, 'markdown-dark')
    page.set_viewport_size(dict(width=375, height=800)); looks(page, tmp_path, 'markdown-phone')
    assert page.evaluate('document.getElementById("scroll").scrollWidth <= innerWidth')

@browsing
def test_copy_answers_where_one_looks(page):
    code = 'a = 1\n\nb = "<tag> & more"'
    script(page, dict(body=events(dict(content=f'Here:\n\n```\n{code}\n```\n'))))
    ask(page, 'code?')
    button = page.get_by_role('button', name='Copy this code')
    for allowed in (True, False): # False: http from another machine has no clipboard at all
        if allowed: page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
        else: page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
        button.click()
        expect(button).to_have_text('Copied'); expect(button).to_have_text('Copy')
        if not allowed: page.evaluate('delete navigator.clipboard')
        assert page.evaluate('navigator.clipboard.readText()') == code
        page.evaluate("navigator.clipboard.writeText('something else')")
    page.evaluate("document.execCommand = () => false; Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    button.click(); expect(button).to_have_text('Not allowed here')

@browsing
def test_touch(browser, url, tmp_path):
    context = browser.new_context(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    page = context.new_page(); page.goto(url)
    expect(page.locator('.keys')).to_be_hidden()                                # no hints about keys it lacks
    expect(page.locator('#hello')).to_contain_text('Ask something'); looks(page, tmp_path, 'touch')
    assert box(page).get_attribute('enterkeyhint') == 'enter'
    sample(page, max_tokens=5); box(page).tap()
    page.keyboard.type('one'); page.keyboard.press('Enter'); page.keyboard.type('two')
    body = sent(page, lambda: page.locator('#send').tap())
    assert body['messages'][-1]['content'] == 'one\ntwo'
    context.close()

HOSTILE = ['[a](javascript:window.hacked=1)', '[a](JaVaScRiPt&colon;window.hacked=1)', '[a](data:text/html,<script>window.hacked=1</script>)',
    '![x](https://evil.example/pixel.png)', '<img src=x onerror=window.hacked=1>', '<svg><a xlink:href="javascript:window.hacked=1">x</a></svg>',
    '<style>body{display:none}</style>', '<form action=https://evil.example><button>go</button></form>', r'$\href{javascript:window.hacked=1}{x}$',
    r'$\includegraphics{https://evil.example/x.png}$', r'$\class{x}{y}\style{position:fixed}{z}$', '[x]: javascript:window.hacked=1\n\n[x]',
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=1&gt;">', '<https://evil.example/"onmouseover="window.hacked=1>',
    '`<img src=x onerror=window.hacked=1>`', '| <img src=x onerror=window.hacked=1> |\n|---|\n| <script>window.hacked=1</script> |',
    r'$\def\a{\a\a}\a$', r'$\rule{9999em}{9999em}$', '>'*3000 + 'x', '*'*3000 + 'x', '['*3000, '- '*1500 + 'x', '```\n</pre><script>window.hacked=1</script>',
    '<a id=now name=log>clobber</a>', '<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>', '$' * 2001, r'\(' * 1000]

@browsing
def test_hostile_markdown(page):
    for text in HOSTILE:
        script(page, dict(body=events(dict(content=f'{text}\n\nafter'))))
        ask(page, 'go'); page.unroute_all()
    body = page.locator('.assistant .body')
    assert body.count() == len(HOSTILE) and body.locator('img, script, style, form, iframe, svg, object, [id], [name]').count() == 0
    for link in body.locator('a').all(): # pressing none of them leads anywhere but out
        assert re.match('https?://|mailto:', link.get_attribute('href') or 'https://'), link.evaluate('e => e.outerHTML')
    names = page.evaluate("[...document.querySelectorAll('.assistant .body *')].flatMap(e => e.getAttributeNames())")
    assert not [n for n in names if n.startswith('on')] and page.evaluate('window.hacked') is None
    wide = page.evaluate("Math.max(...[...document.querySelectorAll('.assistant .body math')].map(e => e.getBoundingClientRect().width), 0)")
    assert wide < 1280

@browsing
def test_tools_apart(page):
    tool = [dict(content='Let me see. '), dict(nano_dh=dict(part='python', text='6*')), dict(nano_dh=dict(part='python', text='7')),
            dict(nano_dh=dict(part='output', text='42')), dict(content='It is 42.')]
    script(page, dict(body=events(*tool)), dict(body=events(dict(content='Yes.'))))
    ask(page, 'six by seven?')
    assert page.locator('.body > p').all_inner_texts() == ['Let me see.', 'It is 42.']
    assert page.locator('figure.python pre').inner_text() == '6*7' and page.locator('figure.output pre').inner_text() == '42'
    body = sent(page, lambda: say(page, 'sure?')); done(page)
    assert body['messages'][1] == dict(role='assistant', content=[dict(type='text', text='Let me see. '), dict(type='python', text='6*7'),
                                       dict(type='output', text='42'), dict(type='text', text='It is 42.')])

@browsing
def test_keyboard(page):
    page.keyboard.type('two')                                                   # the message has the focus from the start
    page.keyboard.press('Shift+Enter'); page.keyboard.type('lines')
    sample(page, max_tokens=LONG); box(page).focus()
    body = sent(page, lambda: page.keyboard.press('Enter'))
    assert body['messages'][0]['content'] == 'two\nlines' and box(page).input_value() == ''
    expect(page.locator('.assistant .body')).not_to_be_empty()
    page.keyboard.press('Escape')
    expect(page.locator('.facts')).to_have_text('stopped')
    page.keyboard.press('ArrowUp')
    edit = page.get_by_label('Edit the message')
    expect(edit).to_be_focused(); assert edit.input_value() == 'two\nlines'
    page.keyboard.press('Escape'); expect(edit).to_have_count(0); expect(box(page)).to_be_focused()
    page.keyboard.press('Shift+Tab')
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == 'solid'
    nameless = page.evaluate('''() => [...document.querySelectorAll('button, input, textarea, select')].filter(e =>
        !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)''')
    assert not nameless

@browsing
@pytest.mark.parametrize('width', [360, 390])
def test_phone(page, tmp_path, width):
    page.set_viewport_size(dict(width=width, height=844))
    long = 'w'*120 + '\n```python\n' + 'x = ' + '1 + '*60 + '1\n```\n' + '**a** `' + 'c'*90 + '`'
    script(page, dict(body=events(dict(content=long), dict(nano_dh=dict(part='python', text='9'*200)), dict(content='\n\nAll said.'),
                                  usage=dict(prompt_tokens=1234, completion_tokens=512, nano_dh=dict(cached_tokens=1000, tokens_per_second=123.4,
                                             context_used=1746, context_limit=2048)))))
    ask(page, 'v'*150)
    fits = lambda: page.evaluate('document.documentElement.scrollWidth <= innerWidth && document.getElementById("scroll").scrollWidth <= innerWidth')
    assert fits()
    looks(page, tmp_path, f'phone-{width}')
    page.get_by_role('button', name='Chats').click()
    expect(page.get_by_role('button', name='New chat')).to_be_focused(); assert fits()
    page.keyboard.press('Escape')
    expect(page.get_by_role('button', name='New chat')).to_be_hidden()
    for name in ('Settings', 'Memory'):
        page.get_by_role('button', name=name).click()
        b = page.locator('dialog[open]').bounding_box()
        assert b['x'] >= 0 and b['x'] + b['width'] <= width and fits()
        page.keyboard.press('Escape')
    for e in page.locator('header button:visible, #composer button:visible').all(): assert e.bounding_box()['height'] >= 32
    page.emulate_media(color_scheme='dark'); looks(page, tmp_path, f'phone-{width}-dark')

@browsing
def test_scrolls_only_at_the_bottom(page):
    page.set_viewport_size(dict(width=600, height=400))
    sample(page, max_tokens=LONG)
    place = lambda: page.evaluate('(s => [s.scrollTop, s.scrollHeight - s.clientHeight - s.scrollTop])(document.getElementById("scroll"))')
    say(page, 'A lot')
    page.wait_for_selector('.assistant .body:has-text(" ")')
    until(page, lambda: place()[0] > 60)                                        # it follows
    expect(page.locator('#down')).to_be_hidden()
    page.evaluate('document.getElementById("scroll").scrollTop = 0')
    before = len(words(page)[1])
    until(page, lambda: len(words(page)[1]) > before + 20); assert place()[0] == 0   # it stays where one reads
    page.locator('#down').click()
    expect(page.locator('#down')).to_be_hidden(); assert place()[1] < 48
    page.keyboard.press('Escape'); done(page)

@browsing
def test_rename_search_and_export(page, tmp_path):
    script(page, *[dict(body=events(dict(content=t))) for t in ('The **Danube** flows.', 'A cat sleeps.')])
    sample(page, system='Be brief.'); ask(page, 'River?')
    page.get_by_role('button', name='New chat').click(); ask(page, 'Animal?', system='')
    page.get_by_role('button', name='Rename or export').click()
    expect(page.locator('#new-name')).to_have_value('Animal?')
    page.locator('#new-name').fill('  On cats  '); page.keyboard.press('Enter')
    expect(page.locator('#title')).to_have_text('On cats'); page.reload(); expect(page.locator('#title')).to_have_text('On cats')
    titles = lambda: [x.get_attribute('title') for x in page.locator('#chats .open').all()]
    find = page.get_by_label('Search the chats')
    assert titles() == ['On cats', 'River?']
    find.fill('danube'); assert titles() == ['River?']                          # in an answer
    looks(page, tmp_path, 'search')
    page.locator('#chats .open').click(); assert words(page)[0] == 'River?'
    find.fill('ON CAT'); assert titles() == ['On cats']; find.fill('no such words'); assert titles() == []
    expect(page.locator('#none')).to_be_visible(); find.fill('')
    def file(name):
        with page.expect_download() as d: page.get_by_role('button', name=name).click()
        d.value.save_as(tmp_path/d.value.suggested_filename); return tmp_path/d.value.suggested_filename
    page.get_by_role('button', name='Rename or export').click(); looks(page, tmp_path, 'name')
    md = file('Export as Markdown')
    assert md.suffix == '.md' and md.read_text() == '# River?\n\n> Be brief.\n\n## You\n\nRiver?\n\n## Model\n\nThe **Danube** flows.\n'
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content='River?'), dict(role='assistant', content='The **Danube** flows.')]
    assert json.loads(file('Export as JSON').read_text())['messages'] == talk
    page.keyboard.press('Escape')
    every = file('Export all chats')
    rows = [json.loads(line) for line in every.read_text().splitlines()]
    assert every.suffix == '.jsonl' and [r['title'] for r in rows] == ['On cats', 'River?'] and rows[1]['messages'] == talk
    from nano_dh.chat_files import read_chats                                   # and training reads them
    assert len(list(read_chats(every))) == 2

@pytest.mark.slow
@browsing
def test_full_queue_counts_down(page):
    full = dict(status=429, headers={'Retry-After': '1'}, content_type='application/json', body=json.dumps(dict(error=dict(message='full'))))
    left = script(page, full, full, full, dict(body=events(dict(content='At last.'))))
    say(page, 'Hello?')
    expect(page.locator('.wait')).to_contain_text(re.compile(r'queue is full. Trying again in \d s'))
    expect(page.locator('#stop')).to_be_visible()
    for n in (2, 1): page.locator('.wait button').click(); until(page, lambda: len(left) == n)
    done(page)                                                                  # the last time by itself
    assert words(page)[1] == 'At last.'
    script(page, full); page.get_by_role('button', name='Regenerate').click()
    expect(page.locator('.wait')).to_be_visible(); page.keyboard.press('Escape'); done(page)
    expect(page.locator('.facts')).to_have_text('stopped')

@browsing
def test_errors_are_said_and_can_be_retried(page):
    bad = dict(status=503, content_type='application/json', body=json.dumps(dict(error=dict(message='the engine rests'))))
    script(page, bad, dict(body=events(dict(content='half '), error='The engine stopped.')), dict(body=events(dict(content='half '), end=False)),
           dict(body=events(dict(content='whole'))))
    said, retry = page.locator('.problem'), page.get_by_role('button', name='Retry')
    for i, sentence in enumerate(['the engine rests', 'The engine stopped.', 'The connection broke in the middle of the answer.']):
        say(page, 'Well?') if i == 0 else retry.click()
        expect(said).to_contain_text(sentence)
        assert words(page) == ['Well?', 'half' if i else '']
    retry.click(); done(page)
    assert words(page) == ['Well?', 'whole']; expect(said).to_have_count(0)

@browsing
@pytest.mark.parametrize('length', [70_000, 450_000, 3_000_000]) # more than the context, more characters than are taken, a larger body
def test_too_long_message_does_not_block(page, tmp_path, length):
    sample(page, max_tokens=5)
    ask(page, 'Short'); box(page).fill('0123456789'*(length//10)); box(page).press('Enter')
    said = page.locator('article.refused .problem')
    expect(said).to_contain_text(re.compile(r'Not part of the chat: .*\d')); expect(page.locator('#send')).to_be_visible()
    assert page.locator('article').count() == 3 and 'answer from the server' not in said.inner_text()
    body = sent(page, lambda: say(page, 'Next')); done(page)
    assert [m['content'] for m in body['messages'] if m['role'] == 'user'] == ['Short', 'Next']
    assert page.locator('article').count() == 5 and len(words(page)[4]) > 0
    page.reload(); expect(page.locator('article')).to_have_count(5)
    looks(page, tmp_path, f'refused-{length}')
    said.get_by_role('button', name='Change it').click()
    assert len(page.get_by_label('Edit the message').input_value()) == length   # nothing written is lost
    page.get_by_label('Edit the message').fill('Shorter')
    body = sent(page, lambda: page.locator('.edit').get_by_role('button', name='Send').click()); done(page)
    assert [m['content'] for m in body['messages'] if m['role'] == 'user'] == ['Short', 'Next', 'Shorter']
    assert page.locator('article.refused').count() == 0 and [words(page)[i] for i in (0, 2, 4)] == ['Short', 'Next', 'Shorter']

@pytest.mark.slow
@browsing
def test_no_server(page):
    page.route(re.compile('/(v1|health)'), lambda r: r.abort())
    say(page, 'Anybody?')
    expect(page.locator('.problem')).to_contain_text('No answer from the server')
    expect(page.locator('#banner')).to_contain_text('Trying again')
    page.unroute(re.compile('/(v1|health)')); page.unroute_all()
    expect(page.locator('#banner')).to_be_hidden()
    sample(page, max_tokens=5)
    page.get_by_role('button', name='Retry').click(); done(page)
    assert len(words(page)[1]) > 0

@browsing
def test_full_storage_is_said(page):
    script(page, *[dict(body=events(dict(content='Noted.')))]*2)
    page.evaluate("(() => { let n = 1 << 22; while (n) try { localStorage.setItem('x' + n + Math.random(), 'y'.repeat(n)) } catch { n >>= 1 } })()")
    ask(page, 'Keep this')
    expect(page.locator('#banner')).to_contain_text('keeps no more chats'); assert words(page)[1] == 'Noted.'
    page.evaluate('localStorage.clear()'); ask(page, 'And this')
    expect(page.locator('#banner')).to_be_hidden()
    page.reload(); assert len(words(page)) == 4

@browsing
def test_key_is_asked_for_and_kept_in_the_tab(page):
    def guard(r):
        ok = r.request.headers.get('authorization') == 'Bearer open sesame'
        r.fulfill(content_type='text/event-stream', body=events(dict(content='Welcome.'))) if ok else \
            r.fulfill(status=401, content_type='application/json', body=json.dumps(dict(error=dict(message='key'))))
    page.route('**/v1/chat/completions', guard)
    say(page, 'Hi')
    page.locator('#key').fill('wrong'); page.keyboard.press('Enter')
    expect(page.locator('#key-say')).to_have_text('That key was not accepted.')
    page.locator('#key').fill('open sesame'); page.keyboard.press('Enter')
    done(page); assert words(page)[1] == 'Welcome.'
    page.reload(); ask(page, 'Again'); assert words(page)[3] == 'Welcome.'
    assert 'sesame' not in page.evaluate('JSON.stringify(localStorage)')

@browsing
def test_memory(page, base, tmp_path):
    def memory(): page.get_by_role('button', name='Memory').click()
    def last(): # what the newest answer says it did not read again
        return map(int, re.search(r'From memory: (\d+) of (\d+) prompt tokens', page.locator('.remembered').last.inner_text()).groups())
    ask(page, 'Remember this: ' + 'a thing of note, '*20, max_tokens=60)
    before = words(page)
    memory(); page.get_by_role('button', name='Save this conversation').click()
    expect(page.locator('#memory-say')).to_contain_text(re.compile(r'Saved [\d.]+ [KM]B'))
    with page.expect_download() as d: page.get_by_role('button', name='Download').click()
    d.value.save_as(tmp_path/'memory'); assert (tmp_path/'memory').stat().st_size > 10_000
    page.reload(); memory()
    page.get_by_role('button', name='Resume', exact=True).click()               # it lies in the browser
    expect(page.locator('dialog[open]')).to_have_count(0)
    assert words(page) == before and page.locator('#chats li').count() == 1
    ask(page, 'Go on')
    kept, of = last(); assert kept > 300 and of - kept < 40
    (tmp_path/'bad').write_bytes(b'not a state')
    memory(); page.locator('#file').set_input_files(tmp_path/'bad')
    expect(page.locator('#memory-say')).not_to_have_text(re.compile('^(Resuming …)?$'))
    with serving(base) as new:                                                  # a server that never saw this chat, and a file
        page.goto(new)
        assert page.locator('article').count() == 0
        memory(); page.locator('#file').set_input_files(tmp_path/'memory')
        expect(page.locator('dialog[open]')).to_have_count(0)
        assert words(page) == before
        ask(page, 'Go on', max_tokens=20)
        kept, of = last(); assert kept > 300 and of - kept < 40

if __name__ == '__main__': PAGE.write_text(policy(PAGE.read_text())); print(f'{PAGE}: hashes written')
