package web

import (
	"crypto/sha256"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

func release(version string) deployments.Pointer {
	return deployments.Pointer{URL: "s3://acme-releases/app/" + version + "/manifest.yaml", Digest: sha256.Sum256([]byte(version))}
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

func entry(key string, v any) kv.Entry { return kv.Entry{Key: key, Value: encode(v), Version: 1} }

// report is what a live node says of the app.
func report(node string, r deployments.UnitReport) kv.Entry {
	e := entry(kv.StatusKey("prod", "web", node), deployments.Report{Node: node, Started: time.Now(), Units: map[string]deployments.UnitReport{"app": r}})
	e.Session = "session-of-" + node
	return e
}

func runs(version string) deployments.UnitReport {
	p := release(version)
	return deployments.UnitReport{State: deployments.StateConverged, Running: p, Want: p, Version: version, Generation: 2, Since: time.Now()}
}

// troubledFleet has a node that runs the target, one on which it failed, one that is pinned, and one that is gone. What people, nodes
// and Git say in it is text.
func troubledFleet(text string) *fleet.Fleet {
	failed := runs("1")
	failed.State, failed.Want, failed.Quarantined, failed.Error = deployments.StateQuarantined, release("2"), []deployments.Digest{release("2").Digest}, text
	pinned := runs("1")
	pinned.Version, pinned.Why, pinned.Pinned, pinned.Drift = text, text, true, []string{text}
	gone := report("web-4", runs("1"))
	gone.Session = ""
	return fleet.Assemble([]kv.Entry{
		entry(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", Author: text, Holder: text, Refused: text, Error: text}),
		entry(kv.DesiredKey(app), deployments.Record{Target: release("2"), Stable: release("1"), Generation: 2, Commit: text, Rollout: &deployments.Progress{
			Phase: deployments.PhasePaused, Cutoff: 1 << 63, Message: text,
		}}),
		entry("desired/prod/web/other", text),
		{Key: kv.PinKey(app) + "/web-3", Value: encode(map[string]string{"release": release("1").String(), "reason": text, "by": text}), Version: 1},
		entry(kv.ControlPrefix+app.String(), text),
		report("web-1", runs("2")), report("web-2", failed), report("web-3", pinned), gone,
		report("<script>", runs("2")),
	}, time.Now())
}

// parse reads a page's main part as XML, which it is, gives the text in it, and reports each element or attribute that isn't one of the
// dashboard's own.
func parse(main string) (text string, err error) {
	d := xml.NewDecoder(strings.NewReader("<main>" + main + "</main>"))
	d.Strict = true
	d.Entity = xml.HTMLEntity
	elements := []string{"main", "section", "h1", "h2", "p", "a", "span", "small", "dl", "dt", "dd", "table", "tr", "th", "td", "code", "br", "svg", "rect"}
	attributes := []string{"class", "href", "title", "viewBox", "preserveAspectRatio", "role", "aria-label", "x", "width", "height"}
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
			b.WriteByte('\n')
		case xml.StartElement:
			if !slices.Contains(elements, t.Name.Local) {
				return "", fmt.Errorf("an element %s", t.Name.Local)
			}
			for _, a := range t.Attr {
				if !slices.Contains(attributes, a.Name.Local) {
					return "", fmt.Errorf("an attribute %s", a.Name.Local)
				}
				if a.Name.Local == "href" && (!strings.HasPrefix(a.Value, "/") || strings.HasPrefix(a.Value, "//")) {
					return "", fmt.Errorf("a link to %s", a.Value)
				}
			}
		}
	}
}

// history is past that needs no store.
func history(text string) *past {
	return &past{read: true, generation: 2, rows: [][]fleet.Text{fleet.HistoryRow(deployments.History{Generation: 2, Release: release("2"), Author: text, Subject: text})}}
}

func TestPages(t *testing.T) {
	t.Parallel()
	f := troubledFleet("what they say")
	w := &Web{}
	for path, wants := range map[string][]string{
		"":                   {"prod/web/app", "prod/web/other", "1 node", "2/3, 1 gone", "paused", "web-2", "what they say", "kedge resume prod/web/app"},
		"prod/web/app":       {release("2").String(), release("1").String(), "web-1", "web-4", "gone", "Nodes", "History", "what they say"},
		"prod/web/app/web-2": {"web-2", "quarantine", "in the way", "kedge retry prod/web/app", "what they say"},
		"prod/web/app/web-3": {"node pin", "decided", "kedge unpin prod/web/app --node web-3"},
	} {
		code, main := w.draw(t.Context(), path, f, history("what they say"))
		text, err := parse(main)
		if code != http.StatusOK || err != nil {
			t.Errorf("/%s: %d, %v\n%s", path, code, err, main)
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("/%s doesn't say %q:\n%s", path, want, text)
			}
		}
	}
	for path, want := range map[string]string{
		"<script>": "no unit of &lt;script&gt;", "prod/web/<b>": "no unit prod/web/&lt;b&gt;",
		"test": "no unit of test", "prod/db": "no unit of prod/db", "prod/web/ap": "did you mean prod/web/app?",
		"prod/web/app/web-11": "did you mean web-1?", "prod/web/app/web-1/x": "no page here",
	} {
		if code, main := w.draw(t.Context(), path, f, &past{}); code != http.StatusNotFound || !strings.Contains(main, want) {
			t.Errorf("/%s: %d %s, want 404 and %q", path, code, main, want)
		}
	}
	if code, main := w.draw(t.Context(), "", nil, &past{}); code != http.StatusServiceUnavailable || !strings.Contains(main, "not read yet") {
		t.Errorf("before the first read: %d %s", code, main)
	}
}

// However many nodes there are, a page has an end.
func TestPagesOfManyNodes(t *testing.T) {
	t.Parallel()
	entries := []kv.Entry{entry(kv.DesiredKey(app), deployments.Record{Target: release("2"), Generation: 2})}
	for i := range 5000 {
		version := "2"
		if i%2 == 0 {
			version = "1"
		}
		entries = append(entries, report(fmt.Sprintf("web-%d", i), runs(version)))
	}
	f := fleet.Assemble(entries, time.Now())
	for path, most := range map[string]int{"": mostTroubled, "prod/web/app": mostNodes} {
		_, main := (&Web{}).draw(t.Context(), path, f, history(""))
		if n := strings.Count(main, `<td><a href="`); n != most {
			t.Errorf("/%s lists %d nodes, want %d", path, n, most)
		}
		if _, err := parse(main); err != nil || strings.Count(main, `class="tiles"`) > 0 || !strings.Contains(main, `aria-label="2500 of 5000 converged"`) {
			t.Errorf("/%s has no bar, %v", path, err)
		}
	}
}

// Whatever people write, nothing of it becomes a part of the page but its text.
func FuzzPages(f *testing.F) {
	for _, s := range []string{"", "plain", `<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, "a\nb\x00\x1b[31m", "&lt;", "'><a href='javascript:x'>", "%s%!", "s3://b/x@sha256:" + strings.Repeat("a", 64), "\xff\ufffe"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		all := troubledFleet(text)
		for _, path := range []string{"prod/web/app", "prod/web/app/web-2"} {
			_, main := (&Web{}).draw(t.Context(), path, all, history(text))
			if _, err := parse(main); err != nil {
				t.Fatalf("/%s: %v\n%s", path, err, main)
			}
			document(path, main)
		}
	})
}
