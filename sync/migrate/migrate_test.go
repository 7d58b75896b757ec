package migrate

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/dir"
	"kedge/policy"
)

// place is where manifests and archives lie: a directory, or a real S3 server.
type place struct {
	t       *testing.T
	dir     string // as files
	url     string // ends in a slash
	objects *object.Client
}

func newPlace(t *testing.T) place {
	d := t.TempDir()
	return place{t, d, "file://" + d + "/", object.New(object.Config{})}
}

func (p place) write(name, text string) string {
	p.t.Helper()
	file := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
	return p.url + name
}

// manifest writes an archive with one file and a link, and a manifest that names it.
func (p place) manifest(name, content, link, more string) string {
	p.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "file", Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}, {Name: "link", Linkname: link, Typeflag: tar.TypeSymlink},
	} {
		if err := w.WriteHeader(h); err != nil {
			p.t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(content)); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		p.t.Fatal(err)
	}
	sum := md5.Sum(b.Bytes())
	src := p.write("archives/"+hex.EncodeToString(sum[:])+".tar", b.String())
	return p.write(name, fmt.Sprintf("# %s\nsrc: %s\nchecksum: %x # md5\ndest: /srv/app\n%s", name, src, sum, more))
}

// published reads the manifest of a release that was published.
func (p place) published(r deployments.Pointer) (*deployments.Manifest, error) {
	raw, err := artifact.ReadManifest(p.t.Context(), p.objects, r)
	if err != nil {
		return nil, err
	}
	return deployments.ParseManifest(raw, r.URL, nil)
}

func (p place) inspect(url string, archives bool) Inspection {
	p.t.Helper()
	raw, err := p.objects.ReadAll(p.t.Context(), url, 1<<20)
	if err != nil {
		p.t.Fatal(err)
	}
	look := p.objects
	if !archives {
		look = nil
	}
	in, err := Inspect(p.t.Context(), look, Source{Name: url, URL: url, Raw: raw})
	if err != nil {
		p.t.Fatal(err)
	}
	return in
}

func TestInspectLooksIntoTheArchive(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	says := func(ps []deployments.Problem) string { return deployments.Problems(ps).Error() }

	in := p.inspect(p.manifest("good.yml", "x", "file", ""), true)
	if len(in.Refused) > 0 || in.Archive == nil || in.Archive.Files != 1 || in.Archive.Links != 1 || len(in.Archive.Outside) != 0 {
		t.Errorf("%+v", in)
	}
	in = p.inspect(p.manifest("out.yml", "x", "/usr/bin/python3", ""), true)
	if len(in.Refused) > 0 || !strings.Contains(says(in.Notes), "link -> /usr/bin/python3") {
		t.Errorf("%+v", in)
	}
	gone := p.manifest("gone.yml", "gone", "file", "")
	if err := os.RemoveAll(filepath.Join(p.dir, "archives")); err != nil {
		t.Fatal(err)
	}
	if in = p.inspect(gone, true); !strings.Contains(in.Refused.Error(), "the archive: ") {
		t.Errorf("%+v", in)
	}
	if in = p.inspect(gone, false); len(in.Refused) > 0 || in.Archive != nil {
		t.Errorf("%+v", in)
	}
	if in = p.inspect(p.write("typo.yml", "desst: /srv/app\n"), false); !strings.Contains(in.Refused.Error(), "typo.yml:1:1") {
		t.Errorf("%+v", in)
	}
	in = p.inspect(p.write("variable.yml", "src: '{{ must_env \"SRC\" }}'\nchecksum: "+strings.Repeat("0", 64)+"\ndest: /srv/app\n"), true)
	if len(in.Refused) > 0 || in.Archive != nil || !strings.Contains(says(in.Notes), "variable") {
		t.Errorf("%+v", in)
	}
}

// Find takes a file, a directory, a URL, a prefix and standard input.
func TestFind(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.write("a/one.yml", "dest: /srv/1\n")
	p.write("a/b/two.yaml", "dest: /srv/2\n")
	p.write("a/readme.txt", "no manifest")
	for text, want := range map[string]int{
		filepath.Join(p.dir, "a"): 2, filepath.Join(p.dir, "a/one.yml"): 1, p.url + "a/": 2, p.url + "a/one.yml": 1, "-": 1,
	} {
		found, err := Find(t.Context(), p.objects, text, strings.NewReader("dest: /srv/3\n"))
		if err != nil || len(found) != want {
			t.Errorf("%s: %d, %v, want %d", text, len(found), err, want)
		}
		for _, s := range found {
			if m, err := deployments.ParseTemplate(s.Raw, s.URL); err != nil || !strings.HasPrefix(m.Dest, "/srv/") {
				t.Errorf("%s: %v", s.Name, err)
			}
		}
	}
	for _, text := range []string{p.url + "none/", p.url + "none.yml", filepath.Join(p.dir, "none")} {
		if found, err := Find(t.Context(), p.objects, text, nil); err == nil {
			t.Errorf("%s: %v", text, found)
		}
	}
}

// What Fix writes is a manifest that nodes take, with the same words and comments but for what it names.
func TestFix(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	url := p.manifest("old.yml", "x", "/usr/bin/python3", "dest_mode: 755   # drwxr-xr-x\ncommands:\n  post:\n    - echo {{ env \"NAME\" \"x\" }}")
	in := p.inspect(url, true)
	text, changed, err := Fix(t.Context(), p.objects, in)
	if err != nil || len(changed) != 3 {
		t.Fatalf("%q, %v\n%s", changed, err, text)
	}
	m, err := deployments.ParseTemplate(text, url)
	if err != nil {
		t.Fatal(err)
	}
	if m.DestMode != 0o755 || m.Symlinks != deployments.SymlinksAny || len(m.Checksum) != 64 {
		t.Errorf("%+v", m)
	}
	for _, kept := range []string{"# old.yml\n", "# drwxr-xr-x", "# md5", `{{ env "NAME" "x" }}`} {
		if !strings.Contains(string(text), kept) {
			t.Errorf("it lost %q:\n%s", kept, text)
		}
	}
	to := filepath.Join(t.TempDir(), "app")
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := artifact.Unpack(t.Context(), p.objects, m, to, artifact.StageOptions{}); err != nil {
		t.Error(err)
	}

	in.Source.Raw = text
	in.Manifest = m
	if again, changed, err := Fix(t.Context(), p.objects, in); err != nil || len(changed) > 0 || !bytes.Equal(again, text) {
		t.Errorf("again: %q, %v", changed, err)
	}
	in = p.inspect(p.write("decimal.yml", "dest: /srv/app\ndest_mode: 0755\n"), false)
	if _, changed, err := Fix(t.Context(), p.objects, in); err != nil || len(changed) > 0 {
		t.Errorf("%q, %v", changed, err)
	}
}

func TestUnitOf(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		path   string
		naming Naming
		want   string
	}{
		{"manifest_www_staging.yml", Naming{}, "staging/www/app"},
		{"manifest_www_back_staging.yml", Naming{}, "staging/www_back/app"},
		{"x/manifest_www_staging.yaml", Naming{Unit: "site"}, "staging/www/site"},
		{"manifest_www_staging.yml", Naming{Stage: "production"}, ""},
		{"prod/web/app2.yml", Naming{}, ""},
		{"prod/web/app2.yml", Naming{Patterns: []string{"{stage}/{role}/{unit}.yml"}}, "prod/web/app2"},
		{"prod/web.yml", Naming{Patterns: []string{"{stage}/{role}/{unit}.yml", "{stage}/{role}.yml"}}, "prod/web/app"},
		{"deploy-20141117-112233.yml", Naming{}, ""},
		{"deploy-20141117-112233.yml", Naming{Patterns: []string{"deploy-*.yml"}, Stage: "prod", Role: "web"}, "prod/web/app"},
		{"a/deploy-web-2.yml", Naming{Patterns: []string{"deploy-{role}-*.yml"}, Stage: "prod"}, "prod/web/app"},
		{"redeploy-web-2.yml", Naming{Patterns: []string{"deploy-{role}-*.yml"}, Stage: "prod"}, ""},
		{"s3://b/manifests/manifest_www_staging.yml", Naming{}, "staging/www/app"},
		{"x.yml", Naming{Patterns: []string{"{rolle}.yml"}}, ""},
		{"x.yml", Naming{Patterns: []string{"{role}{role}.yml"}}, ""},
	} {
		got, err := c.naming.UnitOf(c.path)
		if err != nil {
			got = deployments.UnitID{}
		}
		if want, _ := deployments.ParseUnitID(c.want); got != want {
			t.Errorf("%s: %s, want %s (%v)", c.path, got, c.want, err)
		}
	}
}

// pinnedMeanwhile is a store in which somebody pins the unit right before the first commit of its pin.
type pinnedMeanwhile struct {
	kv.Store
	unit  deployments.UnitID
	value []byte
}

func (s *pinnedMeanwhile) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	if ops[0].Key == kv.PinKey(s.unit) && s.value != nil {
		if err := s.Store.Commit(ctx, nil, kv.Put(kv.PinKey(s.unit), s.value)); err != nil {
			return err
		}
		s.value = nil
	}
	return s.Store.Commit(ctx, lease, ops...)
}

// Import copies to keys that don't change, by real S3, and keeps what people wrote into units' files.
func TestImport(t *testing.T) {
	t.Parallel()
	s3 := objecttest.Start(t)
	p := place{t, s3.Dir(), s3.URL(""), s3.Client()}
	key := func(name string) string { return "manifests/" + name }
	p.manifest(key("manifest_web_prod.yml"), "one", "file", "")
	p.manifest(key("manifest_batch_prod.yml"), "one", "/etc/passwd", "dest_mode: 755\n")
	p.write(key("manifest_db_prod.yml"), "desst: /srv/db\n")
	p.write(key("notes.yml"), "dest: /none\n")
	repo := t.TempDir()
	options := ImportOptions{Objects: p.objects, Prefix: p.url + "manifests", Repo: repo, Fix: true, Archives: true}
	mistyped := options
	mistyped.Naming.Patterns = []string{"manifest_{rolle}_{stage}.yml"}
	if _, _, err := Import(t.Context(), mistyped); err == nil || !strings.Contains(err.Error(), "{rolle} is none of") {
		t.Errorf("with a pattern that doesn't parse: %v", err)
	}
	run := func() map[string]Imported {
		t.Helper()
		done, strange, err := Import(t.Context(), options)
		if err != nil {
			t.Fatal(err)
		}
		if len(strange) != 1 || !strings.HasSuffix(strange[0], "notes.yml") {
			t.Errorf("strange: %q", strange)
		}
		by := map[string]Imported{}
		for _, one := range done {
			by[one.Unit.Role] = one
		}
		return by
	}
	check := func(role string, one Imported) {
		t.Helper()
		tree, err := deployments.Load(os.DirFS(repo))
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range tree.Units {
			if u.ID.Role != role {
				continue
			}
			if u.Release != one.Pointer || !u.Adopt {
				t.Errorf("%+v, want %s", u, one.Pointer)
			}
			m, err := p.published(u.Release)
			if err != nil {
				t.Fatal(err)
			}
			to := filepath.Join(t.TempDir(), "app")
			if err := os.Mkdir(to, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := artifact.Unpack(t.Context(), p.objects, m, to, artifact.StageOptions{}); err != nil {
				t.Error(err)
			}
			return
		}
		t.Errorf("no unit of %s", role)
	}
	first := run()
	if len(first) != 3 || !first["web"].Written || !first["batch"].Written || len(first["batch"].Fixed) != 3 || len(first["db"].Refused) == 0 {
		t.Fatalf("%+v", first)
	}
	check("web", first["web"])
	check("batch", first["batch"])
	if again := run(); again["web"].Written || again["web"].Pointer != first["web"].Pointer {
		t.Errorf("again: %+v", again["web"])
	}

	// The script overwrites its manifest; somebody has written into the unit's file.
	file := first["web"].File
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(string(was), "\nadopt", " # ours\nrollout:\n  canary: 1\nadopt", 1)
	if err := os.WriteFile(file, []byte(edited), 0o644); err != nil {
		t.Fatal(err)
	}
	p.manifest(key("manifest_web_prod.yml"), "two", "file", "")
	second := run()
	if !second["web"].Written || second["web"].Pointer == first["web"].Pointer || second["batch"].Written {
		t.Errorf("%+v", second)
	}
	check("web", second["web"])
	now, err := os.ReadFile(file)
	if want := strings.Replace(edited, first["web"].Pointer.String(), second["web"].Pointer.String(), 1); err != nil || string(now) != want {
		t.Errorf("%s\nwant\n%s", now, want)
	}
	// What was there before is there still: the way back.
	if _, err := p.published(first["web"].Pointer); err != nil {
		t.Error(err)
	}
}

func TestBridge(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	store, err := dir.Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	options := BridgeOptions{Objects: p.objects, Store: store, To: p.url + "kedge/"}
	bridge := func(content string) (Bridged, error) {
		t.Helper()
		options.URL = p.manifest("manifest_web_prod.yml", content, "file", "")
		return Bridge(t.Context(), options)
	}
	app := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	record := func() deployments.Pointer {
		t.Helper()
		e, err := store.Get(t.Context(), kv.DesiredKey(app))
		if err != nil {
			t.Fatal(err)
		}
		r, err := deployments.ParseRecord(e.Value)
		if err != nil {
			t.Fatal(err)
		}
		return r.Target
	}
	pinned := func() deployments.Pointer {
		t.Helper()
		e, err := store.Get(t.Context(), kv.PinKey(app))
		if err != nil {
			t.Fatal(err)
		}
		pin, err := deployments.ParsePin(e.Value)
		if err != nil {
			t.Fatal(err)
		}
		return pin.Release
	}

	one, err := bridge("one")
	if err != nil || one.Unit != app || one.Pinned || !one.Changed || record() != one.Pointer {
		t.Fatalf("%+v, %v", one, err)
	}
	if again, err := bridge("one"); err != nil || again.Changed || again.Pointer != one.Pointer {
		t.Errorf("the same event: %+v, %v", again, err)
	}
	two, err := bridge("two")
	if err != nil || !two.Changed || record() != two.Pointer {
		t.Errorf("%+v, %v", two, err)
	}
	for _, r := range []deployments.Pointer{one.Pointer, two.Pointer} { // both can be fetched for ever
		if _, err := p.published(r); err != nil {
			t.Error(err)
		}
	}
	p.write("manifest_web_prod.yml", "desst: /none\n")
	if _, err := Bridge(t.Context(), options); err == nil || record() != two.Pointer {
		t.Errorf("a manifest that no node takes: %v", err)
	}

	// A mirror runs: the record is its own.
	lease, err := store.Lease(t.Context(), kv.MirrorLease, "m1", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lease.Release(t.Context()) })
	three, err := bridge("three")
	if err != nil || !three.Pinned || !three.Changed || pinned() != three.Pointer || record() != two.Pointer {
		t.Fatalf("%+v, %v", three, err)
	}
	four, err := bridge("four")
	if err != nil || pinned() != four.Pointer {
		t.Errorf("%+v, %v", four, err)
	}
	// A pin that has ended, of whomever and of whatever release, is nobody's.
	for _, by := range []string{"alice", bridgeName} {
		ended := fmt.Sprintf("release: %s\nby: %s\nuntil: 2020-01-01T00:00:00Z\n", three.Pointer, by)
		for _, content := range []string{"three", "four"} {
			if err := store.Commit(t.Context(), nil, kv.Put(kv.PinKey(app), []byte(ended))); err != nil {
				t.Fatal(err)
			}
			b, err := bridge(content)
			if err != nil || !b.Changed || pinned() != b.Pointer {
				t.Errorf("%s, after an expired pin of %s: %+v, %v", content, by, b, err)
			}
			if again, err := bridge(content); err != nil || again.Changed {
				t.Errorf("%s again, after an expired pin of %s: %+v, %v", content, by, again, err)
			}
		}
	}
	// A node whose clock is behind may still follow it for a while.
	justEnded := fmt.Sprintf("release: %s\nby: alice\nuntil: %s\n", four.Pointer, time.Now().UTC().Format(time.RFC3339))
	if err := store.Commit(t.Context(), nil, kv.Put(kv.PinKey(app), []byte(justEnded))); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"three", "four"} {
		if b, err := bridge(content); err == nil || b.Changed || pinned() != four.Pointer {
			t.Errorf("%s, after a pin that has just ended: %+v, %v", content, b, err)
		}
	}
	// An operator who pins it at that moment is heeded.
	ended := fmt.Sprintf("release: %s\nby: alice\nuntil: 2020-01-01T00:00:00Z\n", four.Pointer)
	for _, before := range []kv.Op{kv.Put(kv.PinKey(app), []byte(ended)), kv.Delete(kv.PinKey(app))} {
		if err := store.Commit(t.Context(), nil, before); err != nil {
			t.Fatal(err)
		}
		value := fmt.Appendf(nil, "release: %s\nby: alice\n", two.Pointer)
		fresh := &pinnedMeanwhile{Store: store, unit: app, value: value}
		options.Store = fresh
		if b, err := bridge("three"); err == nil || b.Changed || pinned() != two.Pointer {
			t.Errorf("pinned meanwhile: %+v, %v; %s", b, err, pinned())
		}
		options.Store = store
	}
	// An operator's pin stands.
	if err := store.Commit(t.Context(), nil, kv.Put(kv.PinKey(app), []byte("release: hold\nby: alice\n"))); err != nil {
		t.Fatal(err)
	}
	for text, bounds := range map[string]policy.Bounds{
		"leads to this machine": {NoLocal: true}, "is not from s3://acme": {Sources: []string{"s3://acme"}},
	} {
		options.Bounds = bounds
		if b, err := bridge("from elsewhere"); err == nil || !strings.Contains(err.Error(), text) || b.Changed {
			t.Errorf("%+v: %+v, %v", bounds, b, err)
		}
	}
	options.Bounds = policy.Bounds{NoLocal: true, Sources: []string{strings.TrimSuffix(p.url, "/")}}
	if five, err := bridge("five"); err == nil || !strings.Contains(err.Error(), "somebody has pinned the unit") {
		t.Errorf("%+v, %v", five, err)
	}
}

// A copy has no neighbours: a manifest whose URLs are relative stays where it is.
func TestCopyByDigest(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	digest := strings.Repeat("0", 64)
	for _, c := range []struct{ src, index, delta string }{
		{"file:///a.tar", "file:///i", "file:///d"}, {"a.tar", "file:///i", "file:///d"},
		{"file:///a.tar", "i", "file:///d"}, {"file:///a.tar", "file:///i", "../d"},
	} {
		text := fmt.Sprintf("src: %s\ndest: /srv/app\nindex: {url: %s, size: 1, sha256: %s}\n"+
			"deltas: [{from: %[3]s, url: %s, size: 1, sha256: %[3]s}]\n", c.src, c.index, digest, c.delta)
		whole := c.src != "a.tar" && c.index != "i" && c.delta != "../d"
		id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
		to := p.url + "kedge"
		_, err := CopyByDigest(t.Context(), p.objects, to, id, p.url+"m.yml", []byte(text))
		if whole != (err == nil) || !whole && !strings.Contains(err.Error(), "m.yml can't be copied") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
