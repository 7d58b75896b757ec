package deployments

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"

	"kedge/deployments/fuzzlimit"
)

func FuzzPointer(f *testing.F) {
	f.Add(releaseURL + "@sha256:" + hex64)
	f.Add("\ufeff file:///x@sha256:" + strings.ToUpper(hex64) + "\r\n")
	f.Add("http://[::1]:9000/x@sha256:@sha256:" + hex64)
	f.Fuzz(func(t *testing.T, text string) {
		var p Pointer
		var err error
		fuzzlimit.Run(t, text, func() { p, err = ParsePointer(text) })
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
		var pin Pin
		var err error
		fuzzlimit.Run(t, data, func() { pin, err = ParsePin(data) })
		if err == nil && pin.Hold == !pin.Release.IsZero() {
			t.Errorf("%q is the pin %+v", data, pin)
		}
	})
}

// What was read as an order is the same after it was written and read again.
func FuzzOrder(f *testing.F) {
	f.Add([]byte("abort\n"))
	f.Add([]byte("order: retry\nby: ada\nreason: 'a: b'\n"))
	f.Add([]byte(`{"order":"promote","by":"ada"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var o Order
		var err error
		fuzzlimit.Run(t, data, func() { o, err = ParseOrder(data) })
		if err != nil {
			return
		}
		written, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseOrder(written); len(written) <= MaxOrder && (err != nil || again != o) {
			t.Errorf("%q is %+v, and read again %+v, %v", data, o, again, err)
		}
	})
}

// What programs write is read leniently: whatever is read stays the same when it is written and read again.
func FuzzReport(f *testing.F) {
	f.Add(
		[]byte(
			`{"node":"web-1","agent":"1.4.2","started":"2026-11-24T08:00:00Z","joined":"17","ready":true,` +
				`"units":{"app":{"state":"converged","running":"s3://a/b@sha256:` +
				hex64 + `","facts":{"acted_on":"3"},"quarantined":["` + hex64 + `"],` +
				`"since":"2026-11-24T08:00:00Z","compared":{"release":"` + hex64 + `","differs":1}}}}`,
		),
	)
	fuzzWritten(f, ParseReport)
}

func FuzzHistory(f *testing.F) {
	f.Add(
		[]byte(
			`{"generation":3,"release":"s3://a/b@sha256:` + hex64 + `","commit":"c","author":"Ada",` +
				`"committed":"2026-11-24T08:00:00Z","bad":"` + hex64 + `","pinned":{"claim":1},
				"pins":[{"at":"2026-11-24T08:00:00Z","ended":"2026-11-24T09:00:00Z","node":"web-1","hold":true,"by":"ada",
				"until":"2026-11-24T10:00:00Z"}],"orders":[{"at":"2026-11-24T08:00:00Z","order":"pause","reason":"x"}]}`,
		),
	)
	fuzzWritten(f, ParseHistory)
}

func FuzzMirrorState(f *testing.F) {
	f.Add([]byte(`{"holder":"m","head":"c","past":"a b","applying":"d","rules":{"allow_rewind":true,"max_removed":20}}`))
	f.Add([]byte(`{"freeze":[{"name":"weekend","deny":"0 16 * * FRI","duration":"64h","zone":"Europe/Berlin",
		"units":["prod/*/*"]},
		{"allow":"0 9 * * MON-FRI","duration":"8h0m0s","running":"wait","reason":"x"}],"freeze_more":2}`))
	fuzzWritten(f, func(data []byte) (MirrorState, error) {
		s, err := ParseMirrorState(data)
		windows, more := s.Freezes()
		if told, left := FreezeWindows(windows); len(told)+left != len(windows) || more < 0 {
			panic(fmt.Sprintf("%d windows, told %d, %d left; %d more", len(windows), len(told), left, more))
		}
		return s, err
	})
}

// A snapshot's signature is looked at by who reads it: here every signature counts.
func FuzzSnapshot(f *testing.F) {
	sign := func([]byte) ([]byte, error) { return []byte("s"), nil }
	good, err := Snapshot{URL: "s3://a/b", Records: map[string]string{"desired/prod/web/app": "x"}}.Encode(sign)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"format":1,"snapshot":"{\"records\":{\"\":null}}"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzzlimit.Run(t, data, func() {
			refused := errors.New("not signed")
			if _, err := ParseSnapshot(data, func(_, _ []byte) error { return refused }); err == nil {
				t.Errorf("%q is taken without a signature", data)
			}
			s, err := ParseSnapshot(data, func(_, _ []byte) error { return nil })
			if err != nil {
				return
			}
			for _, record := range s.Records {
				_, _ = ParseRecord([]byte(record))
			}
		})
	})
}

// fuzzWritten reads inputs by parse, and fails unless what was read is written, read and written again as it was.
func fuzzWritten[T any](f *testing.F, parse func([]byte) (T, error)) {
	f.Fuzz(func(t *testing.T, data []byte) {
		var v T
		var err error
		fuzzlimit.Run(t, data, func() { v, err = parse(data) })
		if err != nil {
			return
		}
		written, err := json.Marshal(v)
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		again, err := parse(written)
		if err != nil {
			if len(written) > len(data) {
				return // it has outgrown its bound
			}
			t.Fatalf("%q is written as %s, which doesn't parse: %v", data, written, err)
		}
		if twice, err := json.Marshal(again); err != nil || string(twice) != string(written) {
			t.Errorf("%q is written as %s, and then as %s, %v", data, written, twice, err)
		}
	})
}

// What was read as a record is the same after it was written and read again.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(releaseURL + "@sha256:" + hex64 + "\n"))
	f.Add([]byte("s3://a/\x88/b@sha256:" + hex64))
	f.Add([]byte(`{"target":"s3://a/b@sha256:` + hex64 + `","generation":3}`))
	f.Add(
		[]byte(
			`{"target":"s3://a/b@sha256:` + hex64 + `","stable":"s3://a/c@sha256:` + hex64 + `",` +
				`"generation":3,"retry":1,"commit":"c","after":["base"],"drift":"heal",` +
				`"rollout":{"phase":"canary","cutoff":"17","since":"2026-11-24T08:00:00Z",` +
				`"bad":"` + hex64 + `","over":[{"digest":"` + hex64 + `","cutoff":"3"}]}}`,
		),
	)
	f.Fuzz(func(t *testing.T, data []byte) {
		var r Record
		var err error
		fuzzlimit.Run(t, data, func() { r, err = ParseRecord(data) })
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
		var tree *Tree
		var err error
		fuzzlimit.Run(t, data, func() {
			tree, err = Load(fstest.MapFS{"prod/web/app.yaml": {Data: data}, "prod/web/base.yaml": {Data: []byte(good)}})
		})
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
	example, err := os.ReadFile("example/repo/kedge.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Fuzz(func(t *testing.T, data []byte) {
		var tree *Tree
		var err error
		fuzzlimit.Run(t, data, func() { tree, err = Load(fstest.MapFS{"kedge.yaml": {Data: data}}) })
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

// Values of the node's variables are no part of a manifest's text, whatever they hold: none makes a field, or more than
// its bounds of memory.
func FuzzTemplate(f *testing.F) {
	f.Add([]byte("keep: {{ env \"A\" `3` }}\ncommands: {pre: ['echo {{ must_env `A` }}']}\n"), "x\nname: evil")
	f.Add([]byte("{{ if eq (env `A`) `b` }}keep: {{ printf `%03d` 3 }}{{ else }}keep: {{ env `A` }}{{ end }}\n"), "b")
	f.Add([]byte("name: {{ printf `%1000s` (env `A`) }}\n"), "{{ env `A` }}")
	f.Fuzz(func(t *testing.T, data []byte, value string) {
		fuzzlimit.Run(t, []string{string(data), value}, func() {
			_, _ = ParseManifest(data, manifestURL, func(string) (string, bool) { return value, true })
			_, _ = ParseManifest(data, manifestURL, func(string) (string, bool) { return "", false })
			_, _ = ParseTemplate(data, manifestURL)
		})
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(stretchers))
	f.Add([]byte("{{ env \"A\" }}: [{[{"))
	f.Add([]byte(secretAliases))
	f.Add(
		[]byte(
			"x-a: &a {pre: [id]}\ncommands: {<<: *a, post: [*a], timeout: 1h}\n" +
				"{{ if eq (env `A`) `b` }}keep: {{ printf `%03d` 3 }}{{ end }}\n",
		),
	)
	f.Add(
		[]byte(
			"src: a.tar.zst\nchecksum: " + hex64 + "\ndest: /srv/app\n" +
				"health:\n  checks:\n  - http: {url: http://127.0.0.1/, contains: 'a: b'}\n" +
				"commands:\n  pre: [{run: 'a # b', timeout: 1m30s}]\n",
		),
	)
	f.Fuzz(func(t *testing.T, data []byte) {
		var m *Manifest
		var err error
		fuzzlimit.Run(t, data, func() {
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
