package deployments

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

func FuzzPointer(f *testing.F) {
	f.Add(releaseURL + "@sha256:" + hex64)
	f.Add("\ufeff file:///x@sha256:" + strings.ToUpper(hex64) + "\r\n")
	f.Add("http://[::1]:9000/x@sha256:@sha256:" + hex64)
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePointer(text)
		if err != nil {
			return
		}
		if again, err := ParsePointer(p.String()); err != nil || again != p {
			t.Errorf("%q is %v, and read again %v, %v", text, p, again, err)
		}
		if strings.ContainsAny(p.String(), " \r\n\x00") {
			t.Errorf("%q is %q", text, p)
		}
	})
}

func FuzzPin(f *testing.F) {
	f.Add([]byte("hold"))
	f.Add([]byte("release: s3://a/b@sha256:" + hex64 + "\nuntil: 2026-11-24T08:00:00Z"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pin, err := ParsePin(data)
		if err == nil && pin.Hold == !pin.Release.IsZero() {
			t.Errorf("%q is the pin %+v", data, pin)
		}
	})
}

// What was read as a record is the same after it was written and read again.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(releaseURL + "@sha256:" + hex64 + "\n"))
	f.Add([]byte("s3://a/\x88/b@sha256:" + hex64))
	f.Add([]byte(`{"target":"s3://a/b@sha256:` + hex64 + `","generation":3}`))
	f.Add([]byte(`{"target":"s3://a/b@sha256:` + hex64 + `","stable":"s3://a/c@sha256:` + hex64 + `","generation":3,"retry":1,"commit":"c","after":["base"],"drift":"heal",` +
		`"rollout":{"phase":"canary","cutoff":"17","since":"2026-11-24T08:00:00Z","bad":"` + hex64 + `","over":[{"digest":"` + hex64 + `","cutoff":"3"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRecord(data)
		if err != nil {
			return
		}
		if r.Target.IsZero() {
			t.Errorf("%q is a record without target", data)
		}
		written, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		again, err := ParseRecord(written)
		if err != nil {
			t.Fatalf("%q is written as %s, which doesn't parse: %v", data, written, err)
		}
		if twice, err := json.Marshal(again); err != nil || string(twice) != string(written) {
			t.Errorf("%q is written as %s, and then as %s, %v", data, written, twice, err)
		}
	})
}

func FuzzUnit(f *testing.F) {
	good := "release: s3://a/b@sha256:" + hex64 + "\n"
	f.Add([]byte(good + "after: [base]\nrollout: {canary: 1}\n"))
	f.Add([]byte("\ufeff" + good + "rollout:\r\n  max_unavailable: 10%\r\n  bake: 5m\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := Load(fstest.MapFS{"prod/web/app.yaml": {Data: data}, "prod/web/base.yaml": {Data: []byte(good)}})
		if err != nil {
			isProblems(t, err)
			return
		}
		if len(tree.Units) != 2 || tree.Units[0].Release.IsZero() {
			t.Errorf("%q gives %+v", data, tree.Units)
		}
		if r := tree.Units[0].Rollout; r != nil && (r.Deadline <= 0 || r.OnFailure == "" || r.Approval == "") {
			t.Errorf("%q gives the rollout %+v", data, r)
		}
	})
}

func FuzzSettings(f *testing.F) {
	example, err := installed.ReadFile("example/kedge.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := Load(fstest.MapFS{"kedge.yaml": {Data: data}})
		if err != nil {
			isProblems(t, err)
			return
		}
		for _, w := range tree.Settings.Freeze {
			if w.Kind == "" || w.Zone == nil || w.Duration <= 0 || w.Cron == "" {
				t.Errorf("%q gives the window %+v", data, w)
			}
		}
	})
}

// isProblems fails unless err is a list of mistakes, each in a file.
func isProblems(t *testing.T, err error) {
	t.Helper()
	var problems Problems
	if !errors.As(err, &problems) || len(problems) == 0 {
		t.Fatalf("the error is %v", err)
	}
	for _, p := range problems {
		if p.File == "" || p.Message == "" || p.Line < 0 || p.Column < 0 {
			t.Errorf("problem %+v", p)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(stretchers))
	f.Add([]byte("{{ env \"A\" }}: [{[{"))
	f.Add([]byte("x-a: &a {pre: [id]}\ncommands: {<<: *a, post: [*a], timeout: 1h}\n{{ if eq (env `A`) `b` }}keep: {{ printf `%03d` 3 }}{{ end }}\n"))
	f.Add([]byte("src: a.tar.zst\nchecksum: " + hex64 + "\ndest: /srv/app\nhealth:\n  checks:\n  - http: {url: http://127.0.0.1/, contains: 'a: b'}\ncommands:\n  pre: [{run: 'a # b', timeout: 1m30s}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m *Manifest
		var err error
		bounded(t, data, func() {
			m, err = ParseManifest(data, manifestURL, func(string) (string, bool) { return "x", true })
			if _, open := ParseTemplate(data, manifestURL); err == nil && open != nil && !strings.Contains(string(data), "{{") {
				t.Errorf("%q is valid, and no template: %v", data, open)
			}
		})
		if err != nil {
			return
		}
		if m.Dest != "" && !strings.HasPrefix(m.Dest, "/") {
			t.Errorf("dest %q", m.Dest)
		}
		if m.Src != "" && CheckURL(m.Src) != nil {
			t.Errorf("src %q: %v", m.Src, CheckURL(m.Src))
		}
		written, err := m.Encode()
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		if strings.Contains(string(written), "{{") {
			return // it became a template
		}
		again, err := ParseManifest(written, manifestURL, nil)
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("%q\nis  %+v\nand, written as\n%s\nis  %+v, %v", data, m, written, again, err)
		}
	})
}

// bounded fails where parse takes longer, or more memory, than somebody may take who can have data parsed.
func bounded(t *testing.T, data []byte, parse func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan struct{})
	go func() {
		defer close(done)
		parse()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		panic(fmt.Sprintf("it takes longer than 10 s: %q", data))
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 256<<20 {
		t.Errorf("%q takes %d MiB", data, took>>20)
	}
}
