package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
)

// CI publishes versions one after the other, and names none of the earlier: those before find it cheap to come to
// the next.
func TestPublishOneAfterTheOther(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	publish := func(version string, more ...string) (artifact.Published, string) {
		t.Helper()
		tree := filepath.Join(dir, "trees", version)
		writeTree(t, tree, version)
		if err := os.WriteFile(filepath.Join(tree, "large"), []byte(strings.Repeat("the same in each\n", 4000)+version), 0o644); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"publish", tree, "--to", "file://" + dir + "/releases", "--name", "app", "--version", version, "--dest", "/srv/app", "--json"}, more...)
		out, errs, code := cli(t, "", args...)
		if code != exitDone {
			t.Fatalf("publish %s: exit %d\n%s", version, code, errs)
		}
		var p artifact.Published
		if err := json.Unmarshal([]byte(out), &p); err != nil {
			t.Fatal(err)
		}
		// Half a minute apart, so that their order is clear.
		manifest := filepath.Join(dir, "releases", "app", version, "manifest.yaml")
		at := time.Now().Add(-time.Hour + time.Duration(strings.Index("1.9 1.10 2.0 3.0 4.0", version))*10*time.Second)
		if err := os.Chtimes(manifest, at, at); err != nil {
			t.Fatal(err)
		}
		return p, errs
	}
	from := func(p artifact.Published) string {
		var versions []string
		for _, d := range p.Deltas {
			versions = append(versions, d.Version)
			if d.Bytes <= 0 || d.Requests <= 0 || d.From.IsZero() {
				t.Errorf("a cost of %+v", d)
			}
		}
		return fmt.Sprint(versions)
	}
	for _, c := range []struct{ version, from string }{{"1.9", "[]"}, {"1.10", "[1.9]"}, {"2.0", "[1.10 1.9]"}, {"3.0", "[2.0 1.10 1.9]"}, {"4.0", "[3.0 2.0 1.10]"}} {
		if p, _ := publish(c.version); from(p) != c.from {
			t.Errorf("%s has deltas from %s, want %s", c.version, from(p), c.from)
		}
	}
	// Again, when there are later ones: the same pointer, with the deltas of then.
	first, _ := publish("2.0")
	if !first.AlreadyPublished || len(first.Deltas) > 0 {
		t.Errorf("published again: %+v", first)
	}
	publish("1.9")

	for name, c := range map[string]struct {
		more []string
		from string
	}{
		"none":  {[]string{"--deltas", "0"}, "[]"},
		"one":   {[]string{"--deltas", "1"}, "[4.0]"},
		"named": {[]string{"--since", first.Pointer.String()}, "[2.0]"},
	} {
		p, _ := publish("5-"+name, c.more...)
		if from(p) != c.from {
			t.Errorf("%s has deltas from %s, want %s", name, from(p), c.from)
		}
		os.RemoveAll(filepath.Join(dir, "releases", "app", "5-"+name))
	}
	if _, _, code := cli(t, "", "publish", dir, "--to", "file://"+dir+"/releases", "--name", "app", "--version", "6", "--dest", "/srv/app", "--since", "none"); code != exitUsage {
		t.Errorf("--since with no pointer: exit %d", code)
	}
}

func TestPublishSaysWhatItCosts(t *testing.T) {
	t.Parallel()
	from := deployments.Pointer{URL: "s3://b/app/1/manifest.yaml", Digest: deployments.Digest{1}}
	m := &deployments.Manifest{Name: "app", Version: "2"}
	lines := publishedLines(m, artifact.Published{Files: 3, Tree: 5_000_000, Archive: 900_000, Index: 100_000, Deltas: []artifact.PublishedDelta{
		{From: from, Version: "1", Bytes: 1234, Requests: 1}, {From: from, Bytes: 500_000, Requests: 4, Dropped: 600_000},
	}}, time.Second)
	want := `published app 2 in 1s: 3 files, 5.0 MB, as an archive of 0.9 MB
nodes that run 1 (010000000000) fetch 1.2 kB in 1 request
nodes that run 010000000000 fetch 0.5 MB in 4 requests, as parts of the archive: a delta would take 0.6 MB
nodes that run none of these fetch what changed, at most 1.0 MB`
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// An ECDSA key makes another signature each time. A publish that was cut and is repeated has to end well all the same.
func TestPublishAgainWithAnECDSAKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key := func(name string) string {
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		block, err := ssh.MarshalPrivateKey(private, "")
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	ours, others := key("ours"), key("others")
	tree := filepath.Join(dir, "tree")
	writeTree(t, tree, "1")
	publish := func(key string) (string, string, int) {
		return cli(t, "", "publish", tree, "--to", "file://"+dir+"/releases", "--name", "app", "--version", "1", "--dest", "/srv/app", "--sign", key)
	}
	first, errs, code := publish(ours)
	if code != exitDone {
		t.Fatalf("exit %d\n%s", code, errs)
	}
	release := filepath.Join(dir, "releases", "app", "1")
	signature, err := os.ReadFile(filepath.Join(release, "manifest.yaml.sig"))
	if err != nil {
		t.Fatal(err)
	}
	if again, errs, code := publish(ours); code != exitDone || again != first || !strings.Contains(errs, "published before") {
		t.Errorf("again: exit %d\n%s%s", code, again, errs)
	}
	if now, _ := os.ReadFile(filepath.Join(release, "manifest.yaml.sig")); string(now) != string(signature) {
		t.Error("the signature was overwritten")
	}
	if _, errs, code := publish(others); code != exitFailed || !strings.Contains(errs, "another key") {
		t.Errorf("with another key: exit %d\n%s", code, errs)
	}

	// Cut before the signature, it is repeated at another time, and keeps the time that its manifest has.
	if err := os.Remove(filepath.Join(release, "manifest.yaml.sig")); err != nil {
		t.Fatal(err)
	}
	m, err := os.ReadFile(filepath.Join(release, "manifest.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for time.Now().Unix() == createdOf(t, m) {
		time.Sleep(10 * time.Millisecond)
	}
	if again, errs, code := publish(ours); code != exitDone || again != first {
		t.Errorf("after a cut: exit %d\n%s%s", code, again, errs)
	}
	if _, err := os.Stat(filepath.Join(release, "manifest.yaml.sig")); err != nil {
		t.Error(err)
	}
}

func createdOf(t *testing.T, manifest []byte) int64 {
	t.Helper()
	m, err := deployments.ParseTemplate(manifest, "file:///manifest.yaml")
	if err != nil || m.Created.IsZero() {
		t.Fatalf("%v, %v", m, err)
	}
	return m.Created.Unix()
}

// When a signed release was made is its maker's word, in each form that CI knows it; published again, it stays what
// it was.
func TestPublishSaysWhenItWasMade(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key, _ := signingKey(t, dir, "ci")
	tree := filepath.Join(dir, "tree")
	writeTree(t, tree, "1")
	publish := func(version string, more ...string) (out string, code int) {
		t.Helper()
		args := append([]string{"publish", tree, "--to", "file://" + dir + "/releases", "--name", "app", "--version", version, "--dest", "/srv/app", "--sign", key}, more...)
		out, errs, code := cli(t, "", args...)
		return out + errs, code
	}
	created := func(version string) time.Time {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, "releases", "app", version, "manifest.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		m, err := deployments.ParseManifest(data, "file:///manifest.yaml", os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		return m.Created
	}
	want := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	for version, text := range map[string]string{"1": "2026-11-20T13:00:00+01:00", "2": fmt.Sprint(want.Unix())} {
		first, code := publish(version, "--created", text)
		if code != exitDone || !created(version).Equal(want) {
			t.Errorf("--created %s, exit %d: made at %v\n%s", text, code, created(version), first)
		}
		again, code := publish(version)
		if code != exitDone || !created(version).Equal(want) || !strings.HasPrefix(again, first[:strings.Index(first, "\n")]) {
			t.Errorf("published again, exit %d: made at %v\n%s\nat first:\n%s", code, created(version), again, first)
		}
	}
	before := time.Now().Add(-time.Second)
	if out, code := publish("3"); code != exitDone || created("3").Before(before) || created("3").After(time.Now()) {
		t.Errorf("without --created, exit %d: made at %v\n%s", code, created("3"), out)
	}
	if out, code := publish("4", "--created", "yesterday"); code != exitUsage || !strings.Contains(out, "yesterday") {
		t.Errorf("a time that is none: exit %d\n%s", code, out)
	}
}

// A release says itself what it is called where it was published, whichever way its fields were given.
func TestPublishByFlagsAndTemplate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	writeTree(t, tree, "1")
	for name, c := range map[string]struct {
		template string
		flags    []string
		at       string // "": it is refused
		says     string
	}{
		"a name like the version":    {"", []string{"--name", "1", "--version", "1", "--dest", "/srv/1"}, "1/1", ""},
		"the rest by flags":          {"dest: /srv/a\n", []string{"--name", "a", "--version", "2"}, "a/2", ""},
		"both, the same":             {"name: a\ndest: /srv/a\n", []string{"--name", "a", "--version", "3"}, "a/3", ""},
		"a line without a value":     {"name: a # ours\nversion: # CI's\ndest: /srv/a\n", []string{"--version", "4"}, "a/4", ""},
		"a variable and a flag":      {"name: '{{ env `NOBODY` `a` }}'\nversion: 5\ndest: /srv/a\n", []string{"--name", "a"}, "a/5", ""},
		"another name":               {"name: a\nversion: 6\ndest: /srv/a\n", []string{"--name", "b"}, "", "--name b"},
		"another version":            {"name: a\nversion: 6\ndest: /srv/a\n", []string{"--version", "7"}, "", "--version 7"},
		"another dest":               {"name: a\nversion: 6\ndest: /srv/a\n", []string{"--dest", "/srv/b"}, "", "--dest /srv/b"},
		"a variable alone":           {"name: '{{ env `NOBODY` `a` }}'\nversion: 6\ndest: /srv/a\n", nil, "", "give --name"},
		"JSON":                       {`{"name": "a", "dest": "/srv/a"}`, []string{"--version", "6"}, "", "write it as plain lines"},
		"mistakes, each in its file": {"name: a\nbad: 1\nworse: 2\n", []string{"--version", "6"}, "", "manifest.yaml:3:1: unknown field"},
		"for the default strategy":   {"dest: /srv/a\nshared: [log]\n", []string{"--name", "a", "--version", "6"}, "a/6", ""},
		"for it, with a bare field": {
			"dest: /srv/a\nshared: [log]\nsync_strategy:\n", []string{"--name", "a", "--version", "7"}, "a/7", "",
		},
		"for another strategy": {
			"dest: /srv/a\nshared: [log]\nsync_strategy: rsync\n",
			[]string{"--name", "a", "--version", "6"}, "", "yaml:2:1: shared needs",
		},
		"against the default": {
			"dest: /srv/a\nexcludes: [a]\n",
			[]string{"--name", "a", "--version", "6"}, "", "yaml:2:1: excludes work with sync_strategy rsync only",
		},
	} {
		t.Run(name, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "releases")
			args := append([]string{"publish", tree, "--to", "file://" + to}, c.flags...)
			if c.template != "" {
				file := filepath.Join(t.TempDir(), "manifest.yaml")
				if err := os.WriteFile(file, []byte(c.template), 0o644); err != nil {
					t.Fatal(err)
				}
				args = append(args, "--manifest", file)
			}
			out, errs, code := cli(t, "", args...)
			if c.at == "" {
				if _, err := os.Stat(to); code == exitDone || !strings.Contains(errs, c.says) || err == nil {
					t.Errorf("exit %d, %v\n%s", code, err, errs)
				}
				return
			}
			p, err := deployments.ParsePointer(out)
			if code != exitDone || err != nil || p.URL != "file://"+to+"/"+c.at+"/manifest.yaml" {
				t.Fatalf("exit %d, %s\n%s", code, out, errs)
			}
			m, err := manifestOf(t, object.New(object.Config{}), p, nil)
			if err != nil || m.Name+"/"+m.Version != c.at {
				t.Errorf("%+v, %v", m, err)
			}
		})
	}
}

// A password that slipped into a URL is refused without being told.
// Progress shows where it is written, on standard error: also in P=$(kedge publish …), and not in a file of errors.
func TestPublishShowsProgressOnATerminal(t *testing.T) {
	t.Parallel()
	master, slave := openTerminal(t)
	var file bytes.Buffer
	for _, a := range []*app{{stdout: slave, stderr: &file}, {stdout: &file, stderr: slave}} {
		a.progressLine().show(meter.Progress{Phase: "pack", Done: 1, Total: 4})
	}
	if file.Len() > 0 {
		t.Errorf("a file gets %q", file.String())
	}
	fmt.Fprint(slave, "END")
	var shown []byte
	for b := make([]byte, 1024); !bytes.Contains(shown, []byte("END")); {
		n, err := master.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		shown = append(shown, b[:n]...)
	}
	if !bytes.Contains(shown, []byte("pack  25% of 4 B")) {
		t.Errorf("a terminal shows %q", shown)
	}
}

func TestPublishToAURLThatIsNone(t *testing.T) {
	t.Parallel()
	for to, says := range map[string]string{
		"https://u:secret@h.example/x": "user name or password",
		"s3://b/x?sig=secret":          "carries a query",
		"file:///srv/100%":             "written as %25",
		"/srv":                         "no scheme",
		"s3://":                        "host or bucket",
	} {
		_, errs, code := cli(t, "", "publish", t.TempDir(), "--to", to, "--name", "a", "--version", "1", "--dest", "/srv/a")
		if code != exitUsage || !strings.Contains(errs, says) || strings.Contains(errs, "secret") {
			t.Errorf("--to %s: exit %d\n%s", to, code, errs)
		}
	}
}

// manifestOf reads the manifest of a published release.
func manifestOf(
	t *testing.T, objects *object.Client, p deployments.Pointer, env func(string) (string, bool),
) (*deployments.Manifest, error) {
	t.Helper()
	raw, err := artifact.ReadManifest(t.Context(), objects, p)
	if err != nil {
		return nil, err
	}
	return deployments.ParseManifest(raw, p.URL, env)
}
