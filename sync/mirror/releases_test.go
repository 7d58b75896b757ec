package mirror

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/sync/git"
	"kedge/sync/git/gittest"
	"kedge/sync/mirror/inspect"
)

// manifests is a storage of releases.
type manifests struct {
	t   *testing.T
	dir string
}

// put stores a manifest, and returns the line of a unit's file that names it.
func (m manifests) put(name, text string) string {
	m.t.Helper()
	gittest.WriteFile(m.t, filepath.Join(m.dir, name), text)
	return m.line(name, text)
}

func (m manifests) line(name, text string) string {
	return "release: " + deployments.Pointer{URL: "file://" + filepath.Join(m.dir, name), Digest: sha256.Sum256([]byte(text))}.String() + "\n"
}

// tree returns a manifest that puts a tree at dest, with more lines after it.
func (m manifests) tree(dest, more string) string {
	return "src: file://" + m.dir + "/a.tar\nchecksum: " + strings.Repeat("ab", 32) + "\ndest: " + dest + "\n" + more
}

const bounds = "dests: {prod: [/srv]}\nusers: {prod: [app]}\n"

// A commit whose releases do more than its own kedge.yaml allows for their stage is refused; the error has the
// lines that name them.
func TestReleasesBeyondTheirStagesBounds(t *testing.T) {
	t.Parallel()
	o, store, m := gittest.New(t), dirStore(t), manifests{t, t.TempDir()}
	good := m.put("1", m.tree("/srv/app", "commands: {post: [{run: 'true', user: app}]}\n"))
	free := m.put("free", m.tree("/etc/app", "owner: root\ncommands: {pre: [id]}\n"))
	head := o.Push(map[string]string{"kedge.yaml": bounds, "prod/web/app.yaml": "# the app\n" + good, "dev/web/app.yaml": free})
	mirror := start(t, Config{Store: store, Repo: o.Bare})
	mirror.at(head)
	was := desired(t, store)

	for name, c := range map[string]struct {
		manifest string
		says     []string
	}{
		"dest": {m.tree("/etc/app", ""), []string{"prod/web/app.yaml:1:10: the release does what kedge.yaml does not " +
			"allow for stage prod: dest /etc/app is outside of /srv"}},
		"user": {m.tree("/srv/app", "commands: {failure: [{run: 'id', user: root}]}\n"),
			[]string{`command "id": user root is not among those allowed: app`}},
		"no user": {m.tree("/srv/app", "commands: {pre: [id]}\n"), []string{"set user"}},
		"owner":   {m.tree("/srv/app", "owner: root\n"), []string{"owner: user root"}},
		"a variable": {m.tree("/srv/app", "name: {{ env \"X\" \"a\\ncommands: {pre: [id]}\" }}\n"),
			[]string{"app.yaml:1:10: the release's manifest has the variable X"}},
		"a must variable": {m.tree("/srv/{{ must_env \"X\" }}", ""), []string{"the release's manifest has the variable X"}},
		"no manifest":     {"hello\n", []string{"prod/web/app.yaml:1:10:", "manifest:1:1:"}},
	} {
		head := o.Push(map[string]string{"prod/web/app.yaml": m.put(strings.ReplaceAll(name, " ", "-"), c.manifest), "dev/web/base.yaml": good})
		mirror.refuses(head, c.says...)
		sameDesired(t, store, was)
	}
	mirror.at(o.Push(map[string]string{"prod/web/app.yaml": m.put("2", m.tree("/srv/other", ""))}))

	// Bounding a stage more tightly shows which releases are in the way.
	mirror.refuses(o.Push(map[string]string{"kedge.yaml": bounds + "commands: {\"*\": false, prod: true}\n"}), "dev/web/app.yaml:1:10:", `none are allowed: "id"`)
	mirror.at(o.Push(map[string]string{"kedge.yaml": bounds + "sources: {prod: [file://" + m.dir + "]}\n"}))
	mirror.refuses(o.Push(map[string]string{"prod/web/app.yaml": m.put("3", strings.Replace(m.tree("/srv/app", ""), "a.tar", "../a.tar", 1))}), "is not from file://")
}

// A release that is missing or can't be read holds up its commit, and nothing else. Releases that were taken are
// not read again.
func TestReleasesThatCannotBeRead(t *testing.T) {
	t.Parallel()
	o, store, m := gittest.New(t), dirStore(t), manifests{t, t.TempDir()}
	first := m.tree("/srv/app", "")
	head := o.Push(map[string]string{"kedge.yaml": bounds, "prod/web/app.yaml": m.put("1", first), "prod/web/base.yaml": m.put("base", m.tree("/srv/base", ""))})
	mirror := start(t, Config{Store: store, Repo: o.Bare})
	mirror.at(head)
	was := desired(t, store)
	if err := os.Remove(filepath.Join(m.dir, "base")); err != nil {
		t.Fatal(err)
	}

	second := m.tree("/srv/app", "keep: 2\n")
	next := o.Push(map[string]string{"prod/web/app.yaml": m.line("2", second)})
	waits := func(words ...string) {
		t.Helper()
		s := mirror.status(func(s deployments.MirrorState) bool { return s.Error != "" })
		for _, w := range append(words, "commit "+next[:12]+" is not taken yet",
			"prod/web/app.yaml:1:10: could not read or verify the release") {
			if !strings.Contains(s.Error, w) {
				t.Errorf("no %q in the status %+v", w, s)
			}
		}
		if s.Head != head || s.Refused != "" {
			t.Errorf("the status is %+v", s)
		}
		sameDesired(t, store, was)
	}
	waits("fetch the manifest")
	put(t, store, "desired/prod/web/app", pointer("evil").String())
	mirror.record("prod/web/app", func(r deployments.Record) bool { return r.Generation > 0 }) // the commit that was taken is kept up
	was = desired(t, store)
	mirror.stop()
	mirror = start(t, Config{Store: store, Repo: o.Bare})
	waits("fetch the manifest")
	m.put("2", second)
	mirror.at(next)
}

// With signers, a commit waits until each release that it introduces is signed, whatever its stage.
func TestReleasesMustBeSigned(t *testing.T) {
	t.Parallel()
	o, store, m := gittest.New(t), dirStore(t), manifests{t, t.TempDir()}
	var signed sync.Map // by URL
	trust := func(_ context.Context, p deployments.Pointer, manifest []byte) error {
		if _, ok := signed.Load(p.URL); !ok || sha256.Sum256(manifest) != p.Digest {
			return errors.New("is not signed")
		}
		return nil
	}
	one, two := m.put("1", m.tree("/srv/app", "")), m.put("2", m.tree("/srv/app", "keep: 2\n"))
	signed.Store("file://"+m.dir+"/1", true)
	mirror := start(t, Config{Store: store, Repo: o.Bare, Releases: inspect.Releases{Trust: trust}})
	head := o.Push(map[string]string{"dev/web/app.yaml": one})
	mirror.at(head)
	was := desired(t, store)
	next := o.Push(map[string]string{"dev/web/app.yaml": two})
	s := mirror.status(func(s deployments.MirrorState) bool { return s.Error != "" })
	if s.Head != head || !strings.Contains(s.Error,
		"dev/web/app.yaml:1:10: could not read or verify the release: is not signed") {
		t.Errorf("the status is %+v", s)
	}
	sameDesired(t, store, was)
	signed.Store("file://"+m.dir+"/2", true)
	signed.Delete("file://" + m.dir + "/1") // is no longer named
	mirror.at(next)
}

// A missing release is looked for less and less often; a new commit starts over.
func TestReleasesAreLookedForWithPatience(t *testing.T) {
	t.Parallel()
	m := manifests{t, t.TempDir()}
	repo := t.TempDir()
	if err := os.MkdirAll(filepath.Join(repo, "prod/web"), 0o755); err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, filepath.Join(repo, "prod/web/app.yaml"), m.put("1", m.tree("/srv/app", "")))
	tree, err := deployments.Load(os.DirFS(repo))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var asked []time.Time
		trust := func(context.Context, deployments.Pointer, []byte) error {
			asked = append(asked, time.Now())
			return errors.New("is not signed")
		}
		mirror, err := New(Config{Store: dirStore(t), Repo: repo, Releases: inspect.Releases{Trust: trust}, Env: env()})
		if err != nil {
			t.Fatal(err)
		}
		l := newLeader(mirror, nil)
		looks := func(judged string, d time.Duration) int {
			t.Helper()
			l.acceptor.checkedPair, asked = judged, nil
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				_, err := l.acceptor.inspect(t.Context(), &git.Commit{Tree: tree})
				if err != nil && !strings.Contains(err.Error(), "is not signed") {
					t.Fatal(err)
				}
				synctest.Wait()
			}
			return len(asked)
		}
		for _, judged := range []string{"a..b", "a..c"} {
			began := time.Now()
			if n := looks(judged, 20*time.Second); n < 2 || n > 7 {
				t.Errorf("%d looks in the first 20 s, want some", n)
			} else if after := asked[0].Sub(began); after > 100*time.Millisecond {
				t.Errorf("the first look came after %v", after)
			}
			looks(judged, 5*time.Minute)
			if n := looks(judged, time.Hour); n < 40 || n > 130 {
				t.Errorf("%d looks in a later hour, want about one a minute", n)
			}
		}
	})
}

// A webhook makes the mirror look for a missing release at once, but many webhooks don't make it look more often.
func TestWebhookLooksForReleases(t *testing.T) {
	t.Parallel()
	o, store, m := gittest.New(t), dirStore(t), manifests{t, t.TempDir()}
	text := m.tree("/srv/app", "")
	head := o.Push(map[string]string{"kedge.yaml": bounds, "prod/web/app.yaml": m.line("1", text)})
	c := Config{Store: store, Repo: o.Bare, Listen: "127.0.0.1:0", Env: env("KEDGE_WEBHOOK_SECRET", "hush")}
	patient := func(m *Mirror) { m.releaseRetry, m.hookPause = time.Hour, time.Millisecond }
	leader := start(t, c, patient)
	c.Name = "standby"
	waits := func(s deployments.MirrorState) bool {
		return strings.Contains(s.Error,
			"could not read or verify the release")
	}
	leader.status(waits)
	standby := start(t, c, patient)
	m.put("1", text)
	leader.post("{}", "X-Gitlab-Token", "hush")
	leader.at(head)

	text += "keep: 2\n"
	head = o.Push(map[string]string{"prod/web/app.yaml": m.line("2", text)})
	leader.status(waits)
	m.put("2", text)
	standby.post("{}", "X-Gitlab-Token", "hush")
	leader.at(head)
}

// Storage that hangs holds up neither taken releases nor the mirror's end, and a newer commit doesn't wait for it.
func TestReleasesOnStorageThatHangs(t *testing.T) {
	t.Parallel()
	o, store, m := gittest.New(t), dirStore(t), manifests{t, t.TempDir()}
	asked, hang := make(chan struct{}, 100), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(hang) })
	head := o.Push(map[string]string{"kedge.yaml": bounds, "prod/web/app.yaml": m.put("1", m.tree("/srv/app", ""))})
	mirror := start(t, Config{Store: store, Repo: o.Bare})
	mirror.at(head)

	o.Push(map[string]string{"prod/web/app.yaml": "release: " + server.URL + "/m.yaml@sha256:" + strings.Repeat("ab", 32) + "\n"})
	<-asked
	put(t, store, "desired/prod/web/app", pointer("evil").String())
	mirror.record("prod/web/app", func(r deployments.Record) bool { return r.Generation > 0 })
	next := o.Push(map[string]string{"prod/web/app.yaml": m.put("2", m.tree("/srv/app", "keep: 2\n"))})
	mirror.at(next)

	o.Push(map[string]string{"prod/web/app.yaml": "release: " + server.URL + "/m.yaml@sha256:" + strings.Repeat("ab", 32) + "\n"})
	for len(asked) == 0 {
		time.Sleep(time.Millisecond)
	}
	began := time.Now()
	mirror.stop()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the mirror took %v to stop", took)
	}
}

func TestCheckReleases(t *testing.T) {
	t.Parallel()
	m := manifests{t, t.TempDir()}
	repo := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(repo, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		gittest.WriteFile(t, filepath.Join(repo, name), text)
	}
	check := func() error {
		t.Helper()
		tree, err := deployments.Load(os.DirFS(repo))
		if err != nil {
			t.Fatal(err)
		}
		return inspect.Releases{Objects: object.New(object.Config{})}.Check(t.Context(), tree)
	}
	good := m.put("1", m.tree("/srv/app", ""))
	write("prod/web/a.yaml", good)
	write("prod/web/b.yaml", m.put("variable", "name: {{ must_env \"NAME\" }}\n"))
	if err := check(); err != nil {
		t.Error(err)
	}
	write("prod/web/c.yaml", m.line("1", "other bytes"))
	write("prod/web/d.yaml", m.line("nowhere", ""))
	write("prod/web/e.yaml", m.put("bad", "desst: /srv\n"))
	err := check()
	for _, want := range []string{
		"prod/web/c.yaml:1:10: could not read or verify the release:", "was replaced, or the pointer is mistyped",
		"prod/web/d.yaml:1:10: could not read or verify the release:",
		"prod/web/e.yaml:1:10:", `manifest:1:1: unknown field "desst" in the manifest: did you mean "dest"?`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}

// A pre-receive hook checks the releases that the push changes.
func TestCheckPushOfReleases(t *testing.T) {
	t.Parallel()
	o, m := hooked(t, "100", "pre-receive-releases"), manifests{t, t.TempDir()}
	gone := m.put("gone", m.tree("/srv/base", ""))
	o.Push(map[string]string{"kedge.yaml": bounds, "prod/web/base.yaml": gone})
	if err := os.Remove(filepath.Join(m.dir, "gone")); err != nil {
		t.Fatal(err)
	}
	o.Push(map[string]string{"prod/web/app.yaml": m.put("1", m.tree("/srv/app", ""))})
	o.Commit(map[string]string{"prod/web/app.yaml": m.put("2", m.tree("/etc", ""))})
	if out, err := o.Try(o.Work, "push", "origin", "HEAD:main"); err == nil || !strings.Contains(out, "prod/web/app.yaml:1:10: the release does what kedge.yaml does not allow") {
		t.Errorf("%v: %s", err, out)
	}
	o.Commit(map[string]string{"prod/web/app.yaml": m.line("nowhere", "")})
	if out, err := o.Try(o.Work, "push", "origin", "HEAD:main"); err == nil ||
		!strings.Contains(out, "prod/web/app.yaml:1:10: could not read or verify the release") {
		t.Errorf("%v: %s", err, out)
	}
}

// The mirror follows a redirect to a manifest only if kedge.yaml's sources let the unit's nodes follow it.
func TestRedirectedManifestsKeepToSources(t *testing.T) {
	t.Parallel()
	const manifest = "commands: {pre: [id]}\n"
	var elsewhere atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/in/near":
			http.Redirect(w, r, "/in/home", http.StatusFound)
		case "/in/far":
			http.Redirect(w, r, "/out/home", http.StatusFound)
		case "/out/home":
			elsewhere.Add(1)
			fallthrough
		default:
			_, _ = io.WriteString(w, manifest)
		}
	}))
	t.Cleanup(server.Close)
	for path, says := range map[string]string{"/in/near": "", "/in/far": server.URL + "/out/home is not from"} {
		release := deployments.Pointer{URL: server.URL + path, Digest: sha256.Sum256([]byte(manifest))}
		tree, err := deployments.Load(fstest.MapFS{
			"kedge.yaml":        {Data: []byte("sources: {prod: ['" + server.URL + "/in']}\n")},
			"prod/web/app.yaml": {Data: []byte("release: " + release.String() + "\n")},
		})
		if err != nil {
			t.Fatal(err)
		}
		err = inspect.Releases{Objects: object.New(object.Config{})}.Check(t.Context(), tree)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if elsewhere.Load() > 0 {
		t.Error("the mirror asked elsewhere")
	}
}
