package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv"
)

// oldFleet is a fleet that stretcher deploys to by Consul events, with the application that runs on it.
type oldFleet struct {
	*world
	stretcher string // its program, or kedge by its name
	token     string
	mu        sync.Mutex
	watches   map[string]*exec.Cmd
	logs      map[string]*bytes.Buffer
	asked     atomic.Int64
}

// startWatch has consul watch call a program with each event, as old fleets do.
func (f *oldFleet) startWatch(name string, env []string, handler ...string) {
	f.t.Helper()
	cmd := exec.Command(tooltest.Path(f.t, "consul"),
		slices.Concat([]string{"watch", "-type", "event", "-name", "deploy_web_prod"}, handler)...)
	log := new(bytes.Buffer)
	cmd.Env = slices.Concat(baseEnv(), f.s3.Env(), env, []string{"HOME=" + f.dir})
	cmd.Dir = f.dir
	cmd.Stdout, cmd.Stderr = lockedWriter{&f.mu, log}, lockedWriter{&f.mu, log}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.watches[name], f.logs[name] = cmd, log
	f.t.Cleanup(func() { f.stopWatch(name) })
}

func (f *oldFleet) stopWatch(name string) {
	if cmd := f.watches[name]; cmd != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		delete(f.watches, name)
	}
}

// nodeEnv is the environment of a node's own Consul agent, with a token that may do what stretcher's has to.
func (f *oldFleet) nodeEnv(node string) []string {
	i := slices.IndexFunc(f.nodes(), func(name string) bool { return name == node })
	return append(f.consul.Clients[i].Env(f.token), "SRV="+f.srv(node))
}

func (f *oldFleet) nodes() (names []string) {
	for _, c := range f.consul.Clients {
		names = append(names, c.Name)
	}
	return names
}

// onStretcher has stretcher deploy to a node.
func (f *oldFleet) onStretcher(node string) { f.startWatch(node, f.nodeEnv(node), f.stretcher) }

// deploy is the old deploy script: it makes an archive, writes over the manifest, and sends an event.
func (f *oldFleet) deploy(version string) {
	f.t.Helper()
	tree := filepath.Join(f.dir, "trees", version)
	writeTree(f.t, tree, version)
	if err := os.WriteFile(filepath.Join(tree, "version"), []byte(version), 0o644); err != nil {
		f.t.Fatal(err)
	}
	archive := filepath.Join(f.s3.Dir(), "archives", "app-"+version+".tar.gz")
	if err := os.MkdirAll(filepath.Dir(archive), 0o755); err != nil {
		f.t.Fatal(err)
	}
	script := `set -e
# stretcher leaves files alone whose size and time, in seconds, are the same.
tar czf "$ARCHIVE" --owner=0 --group=0 --mtime="@170000000${VERSION#v}" -C "$TREE" .
mkdir -p "$BUCKET/manifests"
cat > "$BUCKET/manifests/.new" <<END
src: $SRC
checksum: $(sha256sum "$ARCHIVE" | cut -d' ' -f1)
dest: '{{ must_env "SRV" }}/app'
commands:
  pre:
    -
  post:
    - echo $VERSION >> {{ must_env "SRV" }}/posts
  success:
    - cat > /dev/null
END
mv "$BUCKET/manifests/.new" "$BUCKET/manifests/manifest_web_prod.yml"
"$CONSUL" event -name deploy_web_prod s3://kedge/manifests/manifest_web_prod.yml`
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = slices.Concat(baseEnv(), f.consul.Env(f.consul.RootToken), []string{
		"ARCHIVE=" + archive, "TREE=" + tree, "BUCKET=" + f.s3.Dir(), "SRC=" + f.s3.URL("archives/app-"+version+".tar.gz"),
		"VERSION=" + version, "CONSUL=" + tooltest.Path(f.t, "consul"),
	})
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("the deploy script: %v\n%s", err, out)
	}
}

// posts are the versions whose post command ran on a node.
func (f *oldFleet) posts(node string) string {
	data, _ := os.ReadFile(filepath.Join(f.srv(node), "posts"))
	return strings.Join(strings.Fields(string(data)), " ")
}

// serve runs the application of a node, and asks it until the test ends: each answer has to be a version.
func (f *oldFleet) serve(node string) {
	server := httptest.NewServer(http.FileServer(http.Dir(filepath.Join(f.srv(node), "app"))))
	stop, done := make(chan struct{}), make(chan struct{})
	f.t.Cleanup(func() {
		close(stop)
		<-done
		server.Close()
	})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			resp, err := http.Get(server.URL + "/version")
			if err != nil {
				f.t.Errorf("%s does not serve: %v", node, err)
				return
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusOK || !strings.HasPrefix(string(body), "v") {
				f.t.Errorf("%s serves %s %q, %v", node, resp.Status, body, err)
				return
			}
			f.asked.Add(1)
		}
	}()
}

// compared waits until a node's report of the unit is as it should be.
func (f *oldFleet) compared(node string, want func(deployments.UnitReport) bool) {
	f.t.Helper()
	f.reported(node, "app", func(u deployments.UnitReport) string {
		if want(u) {
			return ""
		}
		return fmt.Sprintf("it isn't as it should be: %+v", u.Compared)
	})
}

// TestMigrationGuide goes the way of deployments/docs/migrating.md with three nodes, step by step, and back where
// it says so, while the application has to serve all the way.
//
// The old nodes run the program that KEDGE_STRETCHER names, stretcher's own; or else kedge by its name.
func TestMigrationGuide(t *testing.T) {
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3"}
	f := &oldFleet{world: newWorld(t, nodes...), watches: map[string]*exec.Cmd{}, logs: map[string]*bytes.Buffer{}}
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for name, log := range f.logs {
			if t.Failed() {
				t.Logf("what consul watch says on %s:\n%s", name, log)
			}
		}
	})
	f.token = f.consul.Token(`event_prefix "" { policy = "read" }`)
	if f.stretcher = os.Getenv("KEDGE_STRETCHER"); f.stretcher == "" {
		f.stretcher = filepath.Join(t.TempDir(), "stretcher")
		if err := os.Symlink(f.self(), f.stretcher); err != nil {
			t.Fatal(err)
		}
	}
	kedgeLink := filepath.Join(t.TempDir(), "kedge")
	if err := os.Symlink(f.self(), kedgeLink); err != nil {
		t.Fatal(err)
	}
	app := webApp

	// The fleet as it was.
	for _, node := range nodes {
		if err := os.MkdirAll(f.srv(node), 0o755); err != nil {
			t.Fatal(err)
		}
		f.onStretcher(node)
	}
	f.deploy("v1")
	f.live("app", "v1", nodes...)
	for _, node := range nodes {
		f.serve(node)
	}

	// 1. What would differ?
	if out, errs, code := f.kedgeWith(nil, "check", "--archives", "--manifest", f.s3.URL("manifests/")); code != exitDone {
		t.Fatalf("check: exit code %d\n%s%s", code, out, errs)
	}

	// 2. The bridge. It hands the events on; nobody follows yet.
	bridge := f.consul.Env(f.world.token("bridge", deployments.RuleVars{}))
	f.startWatch("bridge", bridge, kedgeLink, "bridge", "--to", f.s3.URL("kedge"))
	f.deploy("v2")
	f.live("app", "v2", nodes...)
	f.eventually("the event as a record", func() error {
		e, err := f.store.Get(t.Context(), kv.DesiredKey(app))
		if err == nil && !strings.Contains(string(e.Value), "/kedge/prod/web/app/") {
			err = fmt.Errorf("the record is %s", e.Value)
		}
		return err
	})

	// 3. Agents that observe, beside stretcher.
	agents := map[string]*process{}
	same := func(u deployments.UnitReport) bool {
		return u.Reason == deployments.ReasonObserving && u.Compared != nil && u.Compared.Differs == 0 && u.Compared.Release == u.Want.Digest
	}
	for _, node := range nodes {
		agents[node] = f.startAgent(node, "--observe")
	}
	for _, node := range nodes {
		f.compared(node, same)
	}
	if out, _, _ := f.kedge("status", "prod/web/app"); !strings.Contains(out, "byte for byte") {
		t.Errorf("status does not say what was observed:\n%s", out)
	}
	f.deploy("v3")
	f.live("app", "v3", nodes...)
	for _, node := range nodes {
		f.compared(node, same)
	}

	// 4. One node goes over: the agent adopts what stretcher has left.
	over := func(node string) {
		t.Helper()
		f.stopWatch(node)
		if err := agents[node].stop(); err != nil {
			t.Fatal(err)
		}
		before := f.posts(node)
		agents[node] = f.startAgent(node, "--adopt")
		f.compared(node, func(u deployments.UnitReport) bool {
			return u.State == deployments.StateConverged && u.Compared != nil && u.Compared.Adopted
		})
		if after := f.posts(node); after != before {
			t.Errorf("%s ran commands to adopt what it had: %q, before %q", node, after, before)
		}
	}
	over("web-1")
	f.deploy("v4")
	f.live("app", "v4", nodes...)

	// And back: stretcher goes on where the agent was.
	if err := agents["web-1"].stop(); err != nil {
		t.Fatal(err)
	}
	f.onStretcher("web-1")
	f.deploy("v5")
	f.live("app", "v5", nodes...)

	// 5. All go over. What the agent of web-1 ran last is not what lies there now: it deploys the new one.
	f.stopWatch("web-1")
	agents["web-1"] = f.startAgent("web-1", "--adopt")
	over("web-2")
	over("web-3")
	f.deploy("v6")
	f.live("app", "v6", nodes...)
	for _, node := range nodes {
		f.compared(node, func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged })
	}

	// 6. Git: what runs becomes the first commit, and the mirror takes the record over without a switch.
	imported := func() {
		t.Helper()
		out, errs, code := f.kedgeWith(nil, "import", f.s3.URL("manifests"), "--to", f.s3.URL("kedge"), "--repo", f.work)
		if code != exitDone {
			t.Fatalf("import: exit code %d\n%s%s", code, out, errs)
		}
	}
	imported()
	postsBefore := f.posts("web-2")
	f.push("what stretcher deployed last", nil)
	f.startMirror("mirror-1")
	f.eventually("the mirror's record", func() error {
		e, err := f.store.Get(t.Context(), kv.DesiredKey(app))
		if err != nil {
			return err
		}
		if r, err := deployments.ParseRecord(e.Value); err != nil || r.Generation == 0 || !r.Adopt {
			return fmt.Errorf("the record is %s (%v)", e.Value, err)
		}
		return nil
	})
	// An event that comes now becomes a pin.
	f.deploy("v7")
	f.live("app", "v7", nodes...)
	if _, err := f.store.Get(t.Context(), kv.PinKey(app)); err != nil {
		t.Errorf("the event is no pin: %v", err)
	}
	f.eventually("the post commands that ran on web-2", func() error { // and none when the mirror took the record over
		if got, want := f.posts("web-2"), postsBefore+" v7"; got != want {
			return fmt.Errorf("they are %q, want %q", got, want)
		}
		return nil
	})
	imported()
	f.push("what the last event said", nil)
	f.stopWatch("bridge")
	if out, errs, code := f.kedge("unpin", app.String()); code != exitDone {
		t.Fatalf("unpin: exit code %d\n%s%s", code, out, errs)
	}

	// 7. A release of kedge's own, by a push, node by node; and the way back, by a revert.
	eight := f.publish("app", "v8", func(o *artifact.PublishOptions) {
		if err := os.WriteFile(filepath.Join(o.Dir, "version"), []byte("v8"), 0o644); err != nil {
			t.Fatal(err)
		}
	})
	unit := "release: " + eight.String() + "\nrollout:\n  max_unavailable: 1\n"
	f.push("the first release of kedge's own", map[string]*string{app.String(): &unit})
	f.live("app", "v8", nodes...)
	f.gitDo(f.work, "revert", "--no-edit", "HEAD")
	f.gitDo(f.work, "push", "-q", "origin", "main")
	f.live("app", "v7", nodes...)
	if f.asked.Load() < 300 {
		t.Errorf("the application was asked %d times", f.asked.Load())
	}
}
