package web

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet"
)

// troubledScene has a node that runs the target, one on which it failed, one that is pinned, and one that is gone.
// What people, nodes and Git say in it is text.
func troubledScene(text string) scene {
	s := wordsScene(text)
	away := report("web-4", runs("1"))
	away.Session = ""
	s.name = "troubled"
	s.entries = append(s.entries, report("web-1", runs("2")), away, report("<script>", runs("2")))
	return s
}

// wordsScene is the part of troubledScene that has the text.
func wordsScene(text string) scene {
	broken := runs("1")
	broken.State, broken.Want, broken.Quarantined, broken.Error = deployments.StateQuarantined, release("2"),
		[]deployments.Digest{release("2").Digest}, text
	pinned := runs("1")
	pinned.Version, pinned.Message, pinned.Pinned, pinned.Drift = text, text, true, []string{text}
	return scene{name: "words", entries: []kv.Entry{
		entry(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", Author: text,
			Holder: text, Refused: text, Error: text}),
		entry(kv.DesiredKey(app), deployments.Record{Target: release("2"), Stable: release("1"), Generation: 2,
			Commit: text, Rollout: &deployments.Progress{
				Phase: deployments.PhasePaused, Cutoff: 1 << 63, Message: text,
			}}),
		entry(kv.HistoryKey(app, 2), deployments.History{Generation: 2, Release: release("2"), Commit: text,
			Author: text, Subject: text, Note: text,
			Pins:   []deployments.PastPin{{Node: text, Pin: deployments.Pin{Hold: true, By: text, Reason: text}, Error: text}},
			Orders: []deployments.PastOrder{{Order: deployments.Order{Verb: "pause", By: text, Reason: text}}}}),
		entry("desired/prod/web/other", text),
		{Key: kv.PinKey(app) + "/web-3", Value: encode(map[string]string{"release": release("1").String(),
			"reason": text, "by": text}), Version: 1},
		entry(kv.ControlPrefix+app.String(), text),
		report("web-2", broken), report("web-3", pinned),
	}}
}

// words returns the set of the words of a text.
func words(text string) map[string]bool {
	set := map[string]bool{}
	for word := range strings.FieldsSeq(text) {
		set[word] = true
	}
	return set
}

// elements and attributes are those of the dashboard, beside attributes whose names begin with aria-.
var (
	elements = words(`
		html head meta title link script noscript body header footer nav main section div fieldset legend label form
		input select option button br h1 h2 p a i b em span small strong dl dt dd ul ol li table thead tbody
		tr th td code time svg g path rect`)
	attributes = words(`
		class href title viewBox preserveAspectRatio role x y width height id d lang charset name content
		rel src defer tabindex hidden datetime data-ago data-left data-copy data-list data-map data-live
		data-tag scope colspan type value checked selected placeholder maxlength method action http-equiv`)
)

// parse reads a page as XML, which it is but for its first line and what HTML leaves open; it gives the text in it, and
// reports each element or attribute that isn't one of the dashboard's own.
func parse(page string) (text string, err error) {
	d := xml.NewDecoder(strings.NewReader(page))
	d.Strict = false
	d.AutoClose = xml.HTMLAutoClose
	d.Entity = xml.HTMLEntity
	var b strings.Builder
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return b.String(), nil
		}
		if err != nil {
			return "", err
		}
		switch t := t.(type) {
		case xml.CharData:
			b.Write(t)
		case xml.StartElement:
			if !elements[t.Name.Local] {
				return "", fmt.Errorf("an element %s", t.Name.Local)
			}
			for _, a := range t.Attr {
				if !attributes[a.Name.Local] && !strings.HasPrefix(a.Name.Local, "aria-") {
					return "", fmt.Errorf("an attribute %s", a.Name.Local)
				}
				own := strings.HasPrefix(a.Value, "/") && !strings.HasPrefix(a.Value, "//") || a.Value == "#main"
				if a.Name.Local == "href" && !own && !strings.HasPrefix(a.Value,
					"https://git.example.org/acme/deployments/commit/") {
					return "", fmt.Errorf("a link to %s", a.Value)
				}
			}
		}
	}
}

// page is a whole page as a browser gets it.
func page(t *testing.T, w *Web, address string) (int, string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	s, _ := w.latest()
	r := w.render(t.Context(), s, strings.Trim(u.Path, "/"), u.Query())
	return r.code, markup(document(r))
}

// A rollout in a freeze says when its window opens, or that none does.
func TestFrozenRollouts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		facts deployments.Facts
		says  string
	}{
		"until a time": {
			deployments.Facts{"window": "weekend", "until": "2036-11-30T07:00:00Z"}, `datetime="2036-11-30T07:00:00Z"`,
		},
		"for ever": {deployments.Facts{"window": "30 February", "opens": "never"}, "no window opens"},
		"unknown":  {deployments.Facts{"window": "weekend"}, "no end known"},
	} {
		id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
		w := offline(t, scene{entries: append(mirrorEntries(), entry(kv.DesiredKey(id), deployments.Record{
			Target: release("2"), Stable: release("1"), Generation: 2, Rollout: &deployments.Progress{
				Phase: deployments.PhaseFrozen, Since: time.Now(), Reason: deployments.ReasonFrozen, Facts: c.facts,
			},
		}))})
		if _, html := page(t, w, "/-/overrides"); !strings.Contains(html, c.says) {
			t.Errorf("%s: the page lacks %q:\n%s", name, c.says, html)
		}
	}
}

// A window without gaps has no known end: it is drawn to the end of the week, and comes after the open ones that close.
func TestFreezeWindowsWithoutGaps(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 24, 12, 20, 0, 0, time.UTC) // a Tuesday
	mirror := entry(kv.MirrorKey, deployments.MirrorState{Head: "a", Freeze: []deployments.FreezeWindow{
		{Name: "early", Deny: "* * 2-25,28-31 * *", Duration: "1h"},
		{Name: "always", Deny: "0 0 * * *", Duration: "24h"},
		{Name: "lunch", Deny: "0 12 * * TUE", Duration: "1h"},
		{Name: "hourly", Deny: "0 * * * *", Duration: "2h"},
	}})
	rows, _ := (&snapshot{Fleet: fleet.Assemble([]kv.Entry{mirror}, at)}).windowsOf()
	day := func(d, h int) time.Time { return time.Date(2026, 11, d, h, 0, 0, 0, time.UTC) }
	for i, want := range []windowRow{
		{Name: "lunch", Units: "all", Zone: "UTC", Open: true, To: day(24, 13), Path: "M0 0h6v1H0Z"},
		{Name: "early", Units: "all", Zone: "UTC", Open: true, To: day(26, 1).Add(-time.Minute),
			Path: "M0 0h221v1H0ZM504 0h437v1H504Z", Later: "Sat 00:00–Tue 00:59"},
		{Name: "always", Units: "all", Zone: "UTC", Open: true, Path: "M0 0h1008v1H0Z"},
		{Name: "hourly", Units: "all", Zone: "UTC", Open: true, Path: "M0 0h1008v1H0Z"},
	} {
		if got := rows[i]; got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if got := spanIn(policy.Opening{From: day(28, 0)}, time.UTC); got != "from Sat 00:00" {
		t.Errorf("an opening without a known end is listed as %q", got)
	}
	w := offline(t, scene{entries: []kv.Entry{mirror}})
	_, html := page(t, w, "/-/overrides")
	if text, err := parse(html); err != nil || strings.Count(text, "no end known") != 2 {
		t.Errorf("%v: the page doesn't say of two windows that no end is known:\n%s", err, html)
	}
}

// The windows of the week to come are listed, the open ones first, each with its times and units.
func TestFreezeWindows(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 24, 12, 20, 0, 0, time.UTC) // a Tuesday
	f := fleet.Assemble([]kv.Entry{entry(kv.MirrorKey,
		deployments.MirrorState{Head: "a", Freeze: windows(at), FreezeOmitted: 2})}, at)
	rows, more := (&snapshot{Fleet: f}).windowsOf()
	if more != 2 {
		t.Errorf("%d more, want 2", more)
	}
	day := func(d, h, m int) time.Time { return time.Date(2026, 11, d, h, m, 0, 0, time.UTC) }
	for i, want := range []windowRow{
		{Name: "audit", HoldsRunning: true, Units: "prod/db/*", Open: true, To: day(26, 0, 0), Zone: "UTC",
			Later:  "Mon 00:00–Thu 00:00",
			Path:   "M0 0h216v1H0ZM792 0h216v1H792Z",
			Reason: "the auditors look at what runs, and it must be what they looked at last week"},
		{Name: "backup", Units: "*/db/*", From: day(24, 12, 30), To: day(24, 12, 50), Zone: "UTC",
			Later: "Tue 16:30–16:50; Tue 20:30–20:50; Wed 00:30–00:50"},
		{Name: "office hours", Allow: true, Units: "prod/*/*, staging/*/*", From: day(24, 14, 0), To: day(24, 22, 0),
			Zone: "America/New_York", Later: "Wed 09:00–17:00; Thu 09:00–17:00; Fri 09:00–17:00",
			Path: "M12 0h48v1H12ZM156 0h48v1H156ZM300 0h48v1H300ZM444 0h48v1H444ZM876 0h48v1H876Z"},
		{Name: "weekend", Units: "all", From: day(26, 15, 0), To: day(29, 7, 0), Zone: "Europe/Berlin",
			Reason: "nobody is there",
			Path:   "M306 0h384v1H306Z"},
		{Name: "0 0 1 2 *", Units: "all", Zone: "UTC"},
	} {
		got := rows[i]
		if want.Name == "backup" {
			got.Path = ""
		}
		if got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	w := offline(t, scene{entries: mirrorEntries()})
	_, html := page(t, w, "/-/overrides")
	text, err := parse(html)
	for _, want := range []string{"weekend", "none starts within", "start only within", "those under way wait",
		"closes in",
		"not within 7 days", "2 more are not listed"} {
		if err != nil || !strings.Contains(text, want) {
			t.Errorf("%v: the page lacks %q:\n%s", err, want, text)
		}
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	w := offline(t, troubledScene("what they say"))
	for address, wants := range map[string][]string{
		"/": {"app", "other", "2 of 6 converged", "1 gone", "paused", "what they say", "kedge resume prod/web/app",
			"no mirror runs",
			"1 node pinned", "refused what the"},
		"/prod/web/app": {release("2").String(), release("1").String(), "web-1", "web-4", "gone", "Every node",
			"History", "what they say", "kedge resume prod/web/app"},
		"/prod/web/app/web-2": {"web-2", "quarantine", "in the way", "kedge retry prod/web/app", "what they say"},
		"/prod/web/app/web-3": {"node pin", "decided", "kedge unpin prod/web/app --node web-3"},
		"/-/overrides":        {"web-3", "kedge unpin prod/web/app --node web-3", "no end", "what they say"},
	} {
		code, html := page(t, w, address)
		text, err := parse(html)
		if code != http.StatusOK || err != nil {
			t.Errorf("%s: %d, %v\n%s", address, code, err, html)
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%s doesn't say %q:\n%s", address, want, text)
			}
		}
	}
	for address, want := range map[string]string{
		"/%3Cscript%3E": "no unit of &lt;script&gt;", "/prod/web/%3Cb%3E": "No unit prod/web/&lt;b&gt;",
		"/test": "no unit of test", "/prod/db": "no unit of prod/db", "/prod/web/ap": "did you mean prod/web/app?",
		"/prod/web/app/web-11": "did you mean web-1?", "/prod/web/app/web-1/x": "no page here",
	} {
		if code, html := page(t, w, address); code != http.StatusNotFound || !strings.Contains(html, want) {
			t.Errorf("%s: %d %s, want 404 and %q", address, code, html, want)
		}
	}
	if r := w.render(t.Context(), nil, "", nil); r.code != http.StatusServiceUnavailable ||
		!strings.Contains(markup(document(r)), "not read yet") {
		t.Errorf("before the first read: %d", r.code)
	}
}

// What scripts fetch tells a store that was not read from a unit that isn't there.
func TestDataBeforeTheFirstRead(t *testing.T) {
	t.Parallel()
	w := &Web{changed: make(chan struct{})}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for path, serve := range map[string]http.HandlerFunc{"/-/nodes/prod/web/app": w.nodes, "/-/fleet.json": w.json} {
		r, answer := httptest.NewRequestWithContext(gone, http.MethodGet, path, nil), httptest.NewRecorder()
		r.SetPathValue("stage", "prod")
		r.SetPathValue("role", "web")
		r.SetPathValue("unit", "app")
		if serve(answer, r); answer.Code != http.StatusServiceUnavailable ||
			!strings.Contains(answer.Body.String(), notRead) {
			t.Errorf("%s: %d %s", path, answer.Code, answer.Body)
		}
	}
}

// A unit's page says when its rollouts are frozen next: a freeze of other units is not its own.
func TestUnitSaysItsFreeze(t *testing.T) {
	t.Parallel()
	scene := troubledScene("what they say")
	scene.entries = append(scene.entries, entry(kv.MirrorKey,
		deployments.MirrorState{Head: "a", Freeze: []deployments.FreezeWindow{
			{Name: "stocktaking", Deny: "0 0 * * *", Duration: "23h", Units: []string{"prod/web/app"}},
		}}))
	w := offline(t, scene)
	for address, want := range map[string]bool{"/prod/web/app": true, "/prod/web/other": false} {
		_, html := page(t, w, address)
		text, err := parse(html)
		if err != nil || strings.Contains(text, "no rollout starts") != want {
			t.Errorf("%s: %v, want a freeze: %t\n%s", address, err, want, text)
		}
	}
}

// What the filter names, and nothing else, is listed.
func TestFilters(t *testing.T) {
	t.Parallel()
	w := offline(t, bigScene())
	s, _ := w.latest()
	for query, want := range map[string]int{
		"": 200, "stage=staging": 50, "role=web": 8, "stage=prod&role=web": 2, "q=prod-eu/": 50,
		"q=unit:app+stage:staging": 25, "state=wrong": 3,
		"state=pinned": 3, "state=frozen": 1, "state=rollout": 8, "q=version:base-7": 100, "q=prod-eu-media-07": 2,
		"q=nonsense":      0,
		"state=unhealthy": 1, "q=state:unhealthy+unit:app": 1, "state=nonsense": 0, "q=%3A": 200,
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		v, _ := s.overviewOf("/", filterOf(q), "")
		if v.Pager.All != want {
			t.Errorf("%q takes %d units, want %d", query, v.Pager.All, want)
		}
	}
	for _, word := range []string{"prod-eu-media-07", "prod-eu-media-07:"} {
		q := url.Values{"q": {word}}
		if v, _ := s.overviewOf("/", filterOf(q), ""); len(v.Nodes) != maxFound || v.Nodes[0].Name != "prod-eu-media-070" {
			t.Errorf("a search for %s finds %+v", word, v.Nodes)
		}
	}
	listed := map[string]bool{}
	for n := range 4 {
		v, _ := s.overviewOf("/", filter{Page: n + 1}, "")
		for _, r := range v.Rows {
			listed[r.Key] = true
		}
		if last := v.Pager.Next == ""; last != (n >= 2) {
			t.Errorf("page %d goes on to %q", n+1, v.Pager.Next)
		}
	}
	if len(listed) != 200 {
		t.Errorf("all pages list %d units", len(listed))
	}
}

// A unit that needs attention is told of once: the reason doesn't say the phase again.
func TestProblemsSayThePhaseOnce(t *testing.T) {
	t.Parallel()
	for _, s := range []scene{bigScene(), appScene(40, deployments.PhaseRollingBack)} {
		now, _ := offline(t, s).latest()
		for _, u := range now.all() {
			if p := u.problem; p != nil && strings.HasPrefix(p.Why, p.What) {
				t.Errorf("%s: %s %s", s.name, p.What, p.Why)
			}
			for _, step := range stepsOf(u, u.progress) {
				if strings.HasPrefix(step.Note, "rolled back: ") {
					t.Errorf("%s: the phase %s says %s", s.name, step.Name, step.Note)
				}
			}
		}
	}
}

// hostileScene is what a node or a person could write at worst: thousands of units in one report, long texts,
// characters that turn a line around.
func hostileScene() scene {
	long := strings.Repeat("\u202eevil\x1b[31m <b>", 5000)
	units := map[string]deployments.UnitReport{}
	for i := range 3000 {
		r := runs(fmt.Sprint(i))
		r.Error = "e" + long[:30]
		units[fmt.Sprintf("u%04d", i)] = r
	}
	r := failed("1", long)
	r.Version, r.Message, r.Drift, r.State = long, long, []string{long, long}, deployments.State(long)
	units["app"] = r
	var all []kv.Entry
	for i := range 3000 {
		r := runs(fmt.Sprint(i)) // each node another version
		r.State = deployments.State(fmt.Sprint("state", i))
		all = append(all, report(fmt.Sprintf("n-%d", i), r))
		all = append(all, kv.Entry{Key: kv.NodePinKey(app, fmt.Sprintf("n-%d", i)), Value: []byte("hold"), Version: 1})
	}
	all = append(all, reportIn(app.RoleID(), "web-1", units))
	signed, stable := release("2"), release("1")
	signed.URL += "?X-Amz-Credential=x&X-Amz-Signature=s3cret/s3cret.yaml"
	stable.URL = strings.TrimSuffix(stable.URL, "manifest.yaml") + "?token=s3cret.s3cret"
	all = append(all, entry(kv.DesiredKey(app), deployments.Record{Target: signed, Stable: stable, Generation: 1,
		Commit: long[:9000], Rollout: &deployments.Progress{
			Phase: deployments.PhaseFrozen, Message: long[:2000], Reason: deployments.ReasonFrozen,
			Facts: deployments.Facts{"window": long[:900], "until": long[:900]},
		}}))
	all = append(all, entry(kv.MirrorKey, deployments.MirrorState{Head: long, Author: long, Holder: long,
		Refused: long, Error: long}))
	for i := range 500 {
		all = append(all, kv.Entry{Key: fmt.Sprintf("pins/prod/web/%s%d", strings.Repeat("ß", 20), i),
			Value: []byte(long), Version: 1})
	}
	return scene{name: "hostile", entries: all}
}

// However much there is, and whatever stands in it, a page has an end, and none of it turns a line around.
func TestPagesOfHostileReports(t *testing.T) {
	t.Parallel()
	w := offline(t, hostileScene())
	for _, address := range []string{"/", "/?q=e", "/prod/web/app", "/prod/web/app/web-1", "/prod/web/app/n-1",
		"/-/overrides", "/prod/web/none"} {
		_, html := page(t, w, address)
		if len(html) > 400<<10 {
			t.Errorf("%s has %d bytes", address, len(html))
		}
		if _, err := parse(html); err != nil || strings.ContainsAny(html, "\u202e\x1b") ||
			strings.Contains(html, "s3cret") {
			t.Errorf("%s: %v", address, err)
		}
		t.Logf("%s: %d bytes", address, len(html))
	}
	fleet := httptest.NewRecorder()
	w.json(fleet, httptest.NewRequest("GET", "/-/fleet.json", nil))
	if text := fleet.Body.String(); !json.Valid(fleet.Body.Bytes()) || strings.ContainsAny(text, "\u202e\x1b") ||
		strings.Contains(text, "s3cret") || !strings.Contains(text, release("2").Digest.String()) {
		t.Errorf("the fleet as JSON, %d bytes: %.2000s", len(text), text)
	}
}

// Whatever people write, nothing of it becomes a part of a page but its text. which picks the page.
func FuzzPages(f *testing.F) {
	addresses := []string{"/", "/prod/web/app", "/prod/web/app/web-2", "/-/overrides", "/?"}
	for i, s := range []string{"", "plain", `<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`,
		"a\nb\x00\x1b[31m", "&lt;", "'><a href='javascript:x'>", "%s%!", "s3://b/x@sha256:" + strings.Repeat("a", 64),
		"\xff\ufffe"} {
		for which := range addresses {
			f.Add(s, byte(i*len(addresses)+which))
		}
	}
	store := emptyStore(f)
	f.Fuzz(func(t *testing.T, text string, which byte) {
		address := addresses[int(which)%len(addresses)]
		if address == "/?" {
			address += url.Values{"q": {text}, "state": {text}}.Encode()
		}
		fuzzlimit.Run(t, text, func() {
			_, html := page(t, offlineWith(t, wordsScene(text), store), address)
			if _, err := parse(html); err != nil {
				t.Fatalf("%s: %v\n%s", address, err, html)
			}
		})
	})
}

// A change of one node changes a row of the overview, and a few elements of its unit's page: some kilobytes at most.
func TestPatchesAreSmall(t *testing.T) {
	t.Parallel()
	for address, most := range map[string]int{"": 4 << 10, "prod/web/app": 10 << 10} {
		s := bigScene()
		if address != "" {
			s = appScene(10_000, deployments.PhaseRolling)
		}
		w := offline(t, s)
		now, _ := w.latest()
		before := w.render(t.Context(), now, address, nil)
		role := deployments.RoleID{Stage: "prod", Role: "cache"}
		changed := reportIn(role, nodeName(role, 5), map[string]deployments.UnitReport{"app": runs("1.4.9"),
			"base": runs("base-7")})
		if address != "" {
			changed = report("web-05000", runs("1.4.9"))
		}
		i := slices.IndexFunc(s.entries, func(e kv.Entry) bool { return e.Key == changed.Key })
		s.entries[i] = changed
		w.show(s.assemble())
		now, _ = w.latest()
		p := patchOf(before, w.render(t.Context(), now, address, nil))
		data, err := encodePatch(p)
		if err != nil {
			t.Fatal(err)
		}
		size := len(data)
		t.Logf("/%s: a patch of %d bytes, %d elements", address, size, len(p.HTML))
		if size > most || p.Reload || len(p.HTML) == 0 {
			t.Errorf("/%s: %d bytes: %+v", address, size, p)
		}
	}
}

// Patches lead from any rendering to any other.
func TestPatches(t *testing.T) {
	t.Parallel()
	w := offline(t, smallScene())
	now, _ := w.latest()
	small := w.render(t.Context(), now, "prod/web/app", nil)
	w.show(appScene(200, deployments.PhaseRolling).assemble())
	now, _ = w.latest()
	large := w.render(t.Context(), now, "prod/web/app", nil)
	for _, pair := range [][2]*rendered{{nil, small}, {small, large}, {large, small}, {small, small}} {
		html := map[string]string{}
		lists := map[string][]string{}
		if pair[0] != nil {
			html, lists = pair[0].html, pair[0].lists
		}
		p := patchOf(pair[0], pair[1])
		for id, want := range pair[1].html {
			got, changed := p.HTML[id]
			if !changed {
				got = html[id]
			}
			if got != want {
				t.Errorf("%s isn't what it should be", id)
			}
		}
		for list, want := range pair[1].lists {
			got, changed := p.Lists[list]
			if !changed {
				got = lists[list]
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s has %v, want %v", list, got, want)
			}
		}
	}
	if p := patchOf(small, w.render(t.Context(), now, "prod/web/none", nil)); !p.Reload {
		t.Errorf("another page is a patch: %+v", p)
	}
}

// progressOfNodes returns the progress of a record whose nodes report as given.
func progressOfNodes(t *testing.T, r deployments.Record, reports ...deployments.UnitReport) progress {
	t.Helper()
	entries := []kv.Entry{entry(kv.DesiredKey(app), r)}
	for i, u := range reports {
		entries = append(entries, report(fmt.Sprintf("web-%d", i+1), u))
	}
	s, _ := offline(t, scene{entries: entries}).latest()
	return *s.find(app).progress
}

// A node that goes by a pin of its own, or only observes, is no part of a rollout, unless its pin
// names what a unit pin rolls out.
func TestProgressLeavesOutPinnedNodes(t *testing.T) {
	t.Parallel()
	pinned := func(r deployments.UnitReport) deployments.UnitReport { r.Pinned = true; return r }
	held := runs("1")
	held.State, held.Want = deployments.StateHeld, release("2")
	record := deployments.Record{Target: release("2"), Stable: release("1"), Generation: 2, Paced: true,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, SkipsGates: true}}
	ofPin := record
	ofPin.Pinned = &deployments.Pinned{Target: release("1"), Stable: release("1")}
	back := ofPin
	back.Rollout = &deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: 1<<64 - 1}
	for name, c := range map[string]struct {
		record deployments.Record
		want   int
	}{"Git's": {record, 1}, "a pin's": {ofPin, 2}, "a pin's, going back": {back, 1}} {
		p := progressOfNodes(t, c.record, runs("2"), pinned(runs("1")), pinned(held), held, pinned(runs("2")))
		if p.Following != c.want || p.Admitted != c.want {
			t.Errorf("%s: %d of %d admitted, want %d of %[4]d", name, p.Admitted, p.Following, c.want)
		}
	}
}

// A rollout that has nothing to go back to isn't given up: kedge abort would only pause it.
func TestCommandsWithoutAWayBack(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		stable  deployments.Pointer
		serving bool
		want    bool
	}{
		"first release":             {},
		"first, where it is served": {serving: true, want: true},
		"a release before":          {stable: release("1"), want: true},
		"retried, and stable":       {stable: release("2")},
	} {
		for _, phase := range []deployments.Phase{deployments.PhaseCanary, deployments.PhasePendingApproval,
			deployments.PhaseFrozen, deployments.PhaseRolling, deployments.PhasePaused} {
			r := deployments.Record{Target: release("2"), Stable: c.stable, Generation: 2,
				Rollout: &deployments.Progress{Phase: phase, Serving: c.serving}}
			s, _ := offline(t, scene{entries: []kv.Entry{entry(kv.DesiredKey(app), r), report("web-1", runs("2"))}}).latest()
			all := commandsOf(s.find(app))
			if got := slices.ContainsFunc(all, func(c command) bool {
				return strings.HasPrefix(c.Line, "kedge abort ")
			}); got != c.want {
				t.Errorf("%s, %s: abort is offered: %t, in %v", name, phase, got, all)
			}
		}
	}
}

// The numbers above the units are those of the lists that they link to.
func TestTotalsAreWhatTheirLinksList(t *testing.T) {
	t.Parallel()
	s, _ := offline(t, bigScene()).latest()
	totals := s.totals("")
	for state, n := range map[string]int{stateWrong: totals.Wrong, stateRollout: totals.Rollouts,
		statePinned: totals.Pinned} {
		if v, _ := s.overviewOf("/", filter{State: state, Page: 1}, ""); v.Pager.All != n {
			t.Errorf("%s: %d in the totals, %d in the list", state, n, v.Pager.All)
		}
	}
}

// A unit's page reads the words of a search as the overview does: those that choose units choose
// none of its nodes.
func TestQualifiedWordsOnAUnitsPage(t *testing.T) {
	t.Parallel()
	s, _ := offline(t, scene{entries: []kv.Entry{
		entry(kv.DesiredKey(app), deployments.Record{Target: release("1"), Stable: release("1"), Generation: 1}),
		report("web-1", runs("1")), report("web-2", runs("1")), report("prod", runs("2")),
	}}).latest()
	for query, want := range map[string]int{
		"stage:prod": 3, "role:web": 3, "unit:app": 3, "stage:staging": 0, "web-": 2, "web-:": 2, "node:web-2": 1,
		"node:2": 1, "version:2": 1, "state:converged": 2, "stage:prod web-1": 1, ":": 3,
	} {
		v := s.unitOf(s.find(app), "/prod/web/app", filter{Query: query, Page: 1}, nil, "")
		if len(v.Nodes) != want {
			t.Errorf("%q takes %d nodes, want %d", query, len(v.Nodes), want)
		}
	}
}

// A rollout without canaries shows none, in any phase.
func TestStepsWithoutCanary(t *testing.T) {
	t.Parallel()
	for phase, want := range map[deployments.Phase][]string{
		deployments.PhaseFrozen:  {"Freeze", "Rolling", "Everywhere"},
		deployments.PhasePaused:  {"Paused", "Rolling", "Everywhere"},
		deployments.PhaseRolling: {"Rolling", "Everywhere"},
	} {
		r := deployments.Record{Target: release("2"), Stable: release("1"), Generation: 3,
			Rollout: &deployments.Progress{Phase: phase, Cutoff: 1, NoCanary: true}}
		s, _ := offline(t, scene{entries: []kv.Entry{entry(kv.DesiredKey(app), r), report("web-1", runs("1"))}}).latest()
		u := s.find(app)
		var names []string
		for _, step := range stepsOf(u, u.progress) {
			names = append(names, step.Name)
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s: the steps are %v, want %v", phase, names, want)
		}
	}
}

// A retry of a release that was stable has no gates: it begins with the rolling.
func TestStepsOfARetryOfStable(t *testing.T) {
	t.Parallel()
	r := deployments.Record{Target: release("2"), Stable: release("2"), Generation: 3,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1, Promoted: true}}
	s, _ := offline(t, scene{entries: []kv.Entry{entry(kv.DesiredKey(app), r), report("web-1", runs("2"))}}).latest()
	u := s.find(app)
	var names []string
	for _, step := range stepsOf(u, u.progress) {
		names = append(names, step.Name)
	}
	if !slices.Equal(names, []string{"Rolling", "Everywhere"}) {
		t.Errorf("the steps are %v", names)
	}
}
