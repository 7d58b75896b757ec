package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/open"
	"kedge/sync/git/gittest"
)

// Two neighbouring versions, mirror and agents in either order, run side by side: through pushes, a canary, a pin
// and its end, restarts, and the upgrade of what is still old. The earlier version is built from the commit that
// .ci/compat-base names, or KEDGE_COMPAT_BASE.
func TestNeighbouringVersions(t *testing.T) {
	if testing.Short() {
		t.Skip("builds an earlier version: left out by -short")
	}
	old := buildBase(t)
	for name, programs := range map[string]struct{ mirror, agents string }{
		"old mirror, new agents": {old, ""},
		"new mirror, old agents": {"", old},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newCompatFleet(t)
			mirror := f.startMirror(programs.mirror)
			agents := f.startAgents(programs.agents)
			f.push("1")
			f.runs("1", "the first push")
			f.push("2")
			f.runs("2", "a rollout by its canary")
			f.kedge("pin", "prod/web/app", f.pointers["1"], "--reason", "compat")
			f.runs("1", "a pin")
			f.kedge("unpin", "prod/web/app")
			f.runs("2", "the pin's end")

			for _, p := range append(agents, mirror) {
				if err := p.stop(); err != nil {
					t.Fatalf("%s ends with %v", p.name, err)
				}
			}
			mirror = f.startMirror(programs.mirror)
			agents = f.startAgents(programs.agents)
			f.push("3")
			f.runs("3", "a push after all were restarted")

			for _, p := range append(agents, mirror) {
				p.kill()
			}
			f.startMirror("")
			f.startAgents("")
			f.push("4")
			f.runs("4", "a push after the upgrade")
		})
	}
}

// buildBase builds the version that this one has to work beside.
func buildBase(t *testing.T) string {
	t.Helper()
	root := filepath.Join("..", "..")
	named, err := os.ReadFile(filepath.Join(root, ".ci", "compat-base"))
	if err != nil {
		t.Fatal(err)
	}
	base := cmp.Or(os.Getenv("KEDGE_COMPAT_BASE"), strings.TrimSpace(string(named)))
	source, program := t.TempDir(), filepath.Join(t.TempDir(), "kedge-before")
	archive := exec.CommandContext(t.Context(), "git", "archive", "--format=tar", base)
	archive.Dir = root
	var why bytes.Buffer
	archive.Stderr = &why
	tree, err := archive.Output()
	if err != nil {
		t.Fatalf("the version before is built from commit %s, which this clone lacks (%v: %s): "+
			"in a shallow clone, git fetch --unshallow; or name another by KEDGE_COMPAT_BASE", base, err, bytes.TrimSpace(why.Bytes()))
	}
	for _, step := range []*exec.Cmd{
		exec.CommandContext(t.Context(), "tar", "-xf", "-"),
		exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, "./cmd/kedge"),
	} {
		step.Dir, step.Stdin = source, bytes.NewReader(tree)
		if out, err := step.CombinedOutput(); err != nil {
			t.Fatalf("%s of commit %s: %v: %s", step, base, err, out)
		}
	}
	return program
}

// compatFleet is three nodes and a mirror over directories: a store, a bare repo, and releases.
type compatFleet struct {
	*world
	url      string
	repo     *gittest.Origin
	pointers map[string]string
}

const compatNodes = 3

func newCompatFleet(t *testing.T) *compatFleet {
	t.Helper()
	dir := t.TempDir()
	f := &compatFleet{
		world: &world{t: t, dir: dir, processes: map[string]*process{}},
		url:   "file://" + filepath.Join(dir, "kv"), repo: gittest.New(t), pointers: map[string]string{},
	}
	t.Cleanup(f.end)
	for _, sub := range []string{"kv", "releases"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if f.store, err = open.Store(open.Config{URL: f.url}); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, "manifest.yaml")
	text := "name: app\ndest: '{{ must_env `ROOT` }}/app'\nsync_strategy: release\n" +
		"health: {timeout: 10s, checks: [{exec: 'test -s {{ must_env `ROOT` }}/app/VERSION', interval: 100ms}]}\n"
	if err := os.WriteFile(manifest, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for version := range 5 {
		name := fmt.Sprint(version)
		src := filepath.Join(dir, "src", name)
		if err := os.MkdirAll(src, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, "VERSION"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		out := f.kedge("publish", src, "--to", "file://"+filepath.Join(dir, "releases"), "--version", name, "--manifest", manifest)
		f.pointers[name] = strings.TrimSpace(out)
	}
	return f
}

// kedge runs a command of this version.
func (f *compatFleet) kedge(args ...string) string {
	f.t.Helper()
	f.program = ""
	cmd := exec.CommandContext(f.t.Context(), f.self(), args...)
	cmd.Env = append(baseEnv(), "KEDGE_KV="+f.url)
	var words bytes.Buffer
	cmd.Stderr = &words
	out, err := cmd.Output()
	if err != nil {
		f.t.Fatalf("kedge %s: %v: %s", strings.Join(args, " "), err, words.Bytes())
	}
	return string(out)
}

func (f *compatFleet) startMirror(program string) *process {
	f.t.Helper()
	f.program = program
	return f.start("mirror", nil, "mirror", f.repo.Bare, "--kv", f.url, "--every", "1s")
}

func (f *compatFleet) startAgents(program string) (all []*process) {
	f.t.Helper()
	f.program = program
	for i := range compatNodes {
		name := fmt.Sprintf("web-%d", i+1)
		root := filepath.Join(f.dir, name)
		if err := os.MkdirAll(root, 0o755); err != nil {
			f.t.Fatal(err)
		}
		all = append(all, f.start(name, []string{"ROOT=" + root, "KEDGE_LOCAL_SOURCES=true"}, "agent", "--kv", f.url, "--node", name,
			"--stage", "prod", "--roles", "web", "--state-dir", filepath.Join(root, "state")))
	}
	return all
}

// push names a version in the deployments repo, with a canary.
func (f *compatFleet) push(version string) {
	f.t.Helper()
	f.repo.Push(map[string]string{
		"prod/web/app.yaml": "release: " + f.pointers[version] + "\nrollout: {canary: 1, bake: 500ms, max_unavailable: 1}\n",
	})
}

// runs waits until every node runs a version and says that it has converged, and the rollout is over. Nobody may find
// what the others write invalid meanwhile.
func (f *compatFleet) runs(version, after string) {
	f.t.Helper()
	var missing error
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if missing = f.missing(version); missing == nil {
			return
		}
		if time.Now().After(end) {
			f.t.Fatalf("after %s, version %s: %v", after, version, missing)
		}
	}
}

func (f *compatFleet) missing(version string) error {
	f.t.Helper()
	entries, err := f.store.List(f.t.Context(), kv.RolePrefix(kv.StatusPrefix, "prod", "web"))
	if err != nil {
		return err
	}
	converged := 0
	for _, e := range entries {
		report, err := deployments.ParseReport(e.Value)
		if err != nil {
			f.t.Fatalf("%s: %v", e.Key, err)
		}
		unit := report.Units["app"]
		if unit.State == deployments.StateInvalid {
			f.t.Fatalf("%s finds it invalid: %+v", e.Key, unit)
		}
		if unit.State == deployments.StateConverged && unit.Running.String() == f.pointers[version] && e.Session != "" {
			converged++
		}
	}
	if converged < compatNodes {
		return fmt.Errorf("%d of %d nodes are converged on it", converged, compatNodes)
	}
	for i := range compatNodes {
		live, err := os.ReadFile(filepath.Join(f.dir, fmt.Sprintf("web-%d", i+1), "app", "VERSION"))
		if err != nil || string(live) != version {
			return fmt.Errorf("web-%d has %q live (%v)", i+1, live, err)
		}
	}
	e, err := f.store.Get(f.t.Context(), kv.DesiredKey(webApp))
	if err != nil {
		return err
	}
	record, err := deployments.ParseRecord(e.Value)
	if err != nil {
		f.t.Fatalf("the record: %v: %s", err, e.Value)
	}
	if record.Rollout != nil {
		return fmt.Errorf("its rollout is not over: %s", e.Value)
	}
	return nil
}
