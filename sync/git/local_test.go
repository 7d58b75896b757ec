package git

import (
	"path/filepath"
	"strings"
	"testing"

	"kedge/sync/git/gittest"
)

// The error of a clone that lacks objects says what it is, and what to do.
func TestClonesThatLackObjects(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Git(o.Bare, "config", "uploadpack.allowFilter", "true")
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	dir := t.TempDir()
	shallow, partial := filepath.Join(dir, "shallow.git"), filepath.Join(dir, "partial.git")
	o.Git("", "clone", "-q", "--bare", "--depth=1", "file://"+o.Bare, shallow)
	o.Git("", "clone", "-q", "--bare", "--filter=blob:none", "file://"+o.Bare, partial)

	b := openBranch(t, Config{Repo: shallow, Branch: "main"})
	reads(t, b, second)
	in, err := b.Objects()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Descends(t.Context(), first, second); err == nil || !strings.Contains(err.Error(),
		"git fetch --unshallow") {
		t.Errorf("the history of a shallow clone: %v", err)
	}
	if _, err := LoadAt(t.Context(), partial, "main", ""); err == nil || !strings.Contains(err.Error(), "partial clone") {
		t.Errorf("a partial clone: %v", err)
	}
}

// The error of another object format says so, over HTTP and ssh by either protocol and on disk; and so does that of
// a missing branch.
func TestRepositoriesOfAnotherKind(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	other := &gittest.Origin{TB: t, Bare: filepath.Join(t.TempDir(), "other.git"),
		Work: filepath.Join(t.TempDir(), "work")}
	other.Git("", "init", "-q", "--bare", "--object-format=sha256", "-b", "main", other.Bare)
	other.Git("", "init", "-q", "--object-format=sha256", "-b", "main", other.Work)
	other.Git(other.Work, "remote", "add", "origin", other.Bare)
	other.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	h := gittest.ServeHTTPS(t, other)
	fails(t, openHTTPS(t, h), "sha256 by protocol v2", "object format sha256")
	fails(t, openBranch(t, Config{Repo: other.Bare, Branch: "main"}), "sha256 on disk", "object format sha256")
	front(h, speaksV0)
	fails(t, openHTTPS(t, h), "sha256 by protocol v0", "object format sha256")
	for what, more := range map[string]string{"sha256 by ssh, v2": acceptsV2, "sha256 by ssh, v0": ""} {
		fails(t, openSSH(t, gittest.ServeSSH(t, other, more)), what, "object format sha256")
	}

	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	o.Git(o.Work, "push", "-q", "origin", "HEAD:refs/heads/master", "HEAD:refs/heads/team/live")
	h = gittest.ServeHTTPS(t, o)
	for where, repo := range map[string]string{"over HTTP": h.URL, "over HTTP, with a slash": h.URL + "/",
		"on disk": o.Bare} {
		variables := env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)
		fails(t, openBranch(t, Config{Repo: repo, Branch: "mian", Env: variables}), "a branch "+where,
			"no such branch: mian", "which has main, master, team/live")
		reads(t, openBranch(t, Config{Repo: repo, Branch: "refs/heads/team/live", Env: variables}), o.Git(o.Work,
			"rev-parse", "HEAD"))
	}
}

// A slash at the end of a repository's address makes no difference to polls and fetches.
func TestSlashAfterTheAddress(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	branches := map[string]Branch{"on disk": openBranch(t, Config{Repo: o.Bare + "/", Branch: "main"})}
	for what, old := range map[string]bool{"https, v2": false, "https, v0": true} {
		h := gittest.ServeHTTPS(t, o)
		if old {
			front(h, speaksV0)
		}
		h.URL += "/"
		branches[what] = openHTTPS(t, h)
	}
	for what, more := range map[string]string{"ssh, v2": acceptsV2, "ssh, v0": ""} {
		s := gittest.ServeSSH(t, o, more)
		s.URL += "/"
		branches[what] = openSSH(t, s)
	}
	for what, b := range branches {
		t.Log(what)
		reads(t, b, first)
	}
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	for what, b := range branches {
		t.Log(what)
		reads(t, b, second)
	}
}
