package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/fleet"
)

func pemOf(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// The main job: a release is published, deployed by git push, pinned with the consul binary, and reached by a node
// that was down and by one that never ran before.
func TestPushPinAndLateNodes(t *testing.T) {
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3", "web-4"}
	w := newWorld(t, nodes...)
	w.startMirror("mirror-1")
	for _, node := range nodes[:3] {
		w.startAgent(node)
	}
	base, one := w.publish("base", "1"), w.publish("app", "1")
	baseFile, appFile := "release: "+base.String()+"\n", "release: "+one.String()+"\nafter: [base]\n"
	commit := w.push("first", map[string]*string{"prod/web/base": &baseFile, "prod/web/app": &appFile})
	w.live("base", "1", nodes[:3]...)
	w.live("app", "1", nodes[:3]...)

	if out, errs, code := w.kedge("wait", "prod/web", "--commit", commit, "--timeout", "60s"); code != exitDone {
		t.Fatalf("kedge wait: exit %d\n%s%s", code, out, errs)
	}

	t.Run("a second push writes only what changed", func(t *testing.T) {
		before := w.versions()
		two := w.publish("app", "2")
		appFile = "release: " + two.String() + "\nafter: [base]\n"
		commit := w.push("second", map[string]*string{"prod/web/app": &appFile})
		w.live("app", "2", nodes[:3]...)
		if out, errs, code := w.kedge("wait", "prod/web/app", "--commit", commit, "--timeout", "60s"); code != exitDone {
			t.Fatalf("kedge wait: exit %d\n%s%s", code, out, errs)
		}
		var written []string
		for key, version := range w.versions() {
			if before[key] != version && !strings.HasPrefix(key, kv.StatusPrefix) {
				written = append(written, key)
			}
		}
		slices.Sort(written)
		want := []string{"desired/prod/web/app", "history/prod/web/app/0000000002", kv.MirrorKey}
		if !slices.Equal(written, want) {
			t.Errorf("the second push wrote %v, want %v", written, want)
		}
	})

	one2 := w.publish("app", "1")
	if one2 != one {
		t.Errorf("the same tree was published as %s, then as %s", one, one2)
	}
	operator := w.token("operator", deployments.RuleVars{})
	t.Run("consul kv put pins, deleting the key unpins", func(t *testing.T) {
		w.consul.CLI(operator, "", "kv", "put", "kedge/pins/prod/web/app", one.String())
		w.live("app", "1", nodes[:3]...)
		w.consul.CLI(operator, "", "kv", "delete", "kedge/pins/prod/web/app")
		w.live("app", "2", nodes[:3]...)
	})
	t.Run("a pin for one node moves that node alone", func(t *testing.T) {
		w.consul.CLI(operator, "", "kv", "put", "kedge/pins/prod/web/app/web-2", one.String())
		w.live("app", "1", "web-2")
		out, errs, code := w.kedge("explain", "web-2/app")
		if code != exitDone || !strings.Contains(out, "node pin") {
			t.Errorf("kedge explain: exit %d\n%s%s", code, out, errs)
		}
		w.live("app", "2", "web-1", "web-3")
		if _, errs, code := w.kedge("unpin", "prod/web/app", "--node", "web-2"); code != exitDone {
			t.Errorf("kedge unpin: exit %d\n%s", code, errs)
		}
		w.live("app", "2", "web-2")
	})
	t.Run("a node that was down, and one that never ran, end where the others are", func(t *testing.T) {
		if err := w.processes["web-3"].stop(); err != nil {
			t.Errorf("the agent did not end well: %v", err)
		}
		three := w.publish("app", "3")
		w.release("third", three)
		w.live("app", "3", "web-1", "web-2")
		if v, err := readTree(filepath.Join(w.srv("web-3"), "app")); err != nil || v != "2" {
			t.Errorf("the node that is down serves %q, %v; want 2", v, err)
		}
		w.startAgent("web-3")
		w.startAgent("web-4")
		w.live("app", "3", nodes...)
	})
	t.Run("status says what is", func(t *testing.T) {
		w.eventually("kedge status", func() error {
			out, errs, code := w.kedge("status", "--json")
			if code != exitDone {
				return fmt.Errorf("exit %d: %s", code, errs)
			}
			var f fleet.Fleet
			if err := json.Unmarshal([]byte(out), &f); err != nil {
				return err
			}
			for _, u := range f.Units {
				if u.Live != 4 || u.Converged != 4 || u.Gone != 0 {
					return fmt.Errorf("%s: %d of %d converged, %d gone", u.ID, u.Converged, u.Live, u.Gone)
				}
			}
			if len(f.Units) != 2 {
				return fmt.Errorf("%d units", len(f.Units))
			}
			return nil
		})
	})
}

// Bad input changes nothing on nodes, and says what is wrong, where.
func TestBadInputChangesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1", "web-2")
	w.startMirror("mirror-1")
	w.startAgent("web-1")
	one, two := w.publish("app", "1"), w.publish("app", "2")
	head := w.release("first", one)
	t.Run("an agent with a mistyped role is not ready, and is shown", func(t *testing.T) {
		client := w.consul.Clients[1]
		address := kvtest.FreeAddr(t, client.IP)
		token := w.token("agent", deployments.RuleVars{Node: "web-2", Stage: "prod", Role: "wbe"})
		w.start("web-2", client.Env(token), "agent", "--node", "web-2", "--stage", "prod", "--roles", "wbe",
			"--state-dir", filepath.Join(w.dir, "web-2", "state"), "--listen", address)
		w.eventually("/ready says that its role may be wrong", func() error {
			_, err := get("http://" + address + "/ready")
			if err == nil || !strings.Contains(err.Error(), "see whether this agent's stage and role are right") {
				return fmt.Errorf("it says %v", err)
			}
			return nil
		})
		w.eventually("kedge status shows it", func() error {
			out, _, _ := w.kedge("status")
			if !strings.Contains(out, "web-2") || !strings.Contains(out, "no unit is meant for prod/wbe") {
				return errors.New(out)
			}
			return nil
		})
		if err := w.processes["web-2"].stop(); err != nil {
			t.Error(err)
		}
	})
	w.live("app", "1", "web-1")
	operator := w.token("operator", deployments.RuleVars{})
	pin := func(value string) {
		w.consul.CLI(operator, value, "kv", "put", "kedge/pins/prod/web/app", "-")
	}
	unchanged := func(t *testing.T, wantError ...string) {
		t.Helper()
		w.reported("web-1", "app", func(u deployments.UnitReport) string {
			for _, want := range wantError {
				if !strings.Contains(u.Error, want) {
					return fmt.Sprintf("the error does not say %q", want)
				}
			}
			return ""
		})
		if v, err := readTree(filepath.Join(w.srv("web-1"), "app")); err != nil || v != "1" {
			t.Errorf("%q, %v is live, want 1", v, err)
		}
	}
	for name, c := range map[string]struct {
		value string
		says  []string
	}{
		"a pin without a digest":  {one.URL, []string{"pin", "sha256"}},
		"a pin with a short one":  {one.URL + "@sha256:abc", []string{"pin", "64"}},
		"an empty pin":            {"", []string{"pin", "empty"}},
		"a pin of another scheme": {"ftp://x/y@sha256:" + one.Digest.String(), []string{"pin", "ftp"}},
		"a misspelt hold":         {"hodl", []string{"pin"}},
	} {
		t.Run(name, func(t *testing.T) {
			pin(c.value)
			unchanged(t, c.says...)
		})
	}
	t.Run("a pin whose manifest has another digest", func(t *testing.T) {
		wrong := deployments.Pointer{URL: two.URL, Digest: deployments.Digest{1}}
		pin(wrong.String())
		unchanged(t, "digest")
	})
	t.Run("a pin to a manifest that isn't there", func(t *testing.T) {
		pin(strings.Replace(two.String(), "/2/", "/nowhere/", 1))
		unchanged(t, "no such object")
	})
	t.Run("a pin with CRLF, a BOM and blanks is a good pin", func(t *testing.T) {
		pin("\ufeff  " + two.String() + "\r\n")
		w.live("app", "2", "web-1")
		w.consul.CLI(operator, "", "kv", "delete", "kedge/pins/prod/web/app")
		w.live("app", "1", "web-1")
	})
	for name, c := range map[string]struct {
		files map[string]string
		says  string
	}{
		"a commit with an unknown field":   {map[string]string{"prod/web/app": "release: " + two.String() + "\nrelaese: x\n"}, "prod/web/app.yaml:2:1"},
		"a commit with a cycle in after":   {map[string]string{"prod/web/app": "release: " + two.String() + "\nafter: [base]\n", "prod/web/base": "release: " + two.String() + "\nafter: [app]\n"}, "cycle"},
		"a commit with a release mistyped": {map[string]string{"prod/web/app": "release: " + two.URL + "\n"}, "prod/web/app.yaml:1"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]*string{}
			for id, content := range c.files {
				files[id] = &content
			}
			bad := w.push(name, files)
			w.eventually("the mirror refuses the commit", func() error {
				f, err := fleet.Read(t.Context(), w.store, fleet.Filter{})
				if err != nil {
					return err
				}
				if f.Mirror == nil || f.Mirror.Refused != bad || !strings.Contains(f.Mirror.Error, c.says) {
					return fmt.Errorf("the mirror's state is %+v, want %s refused, and %q", f.Mirror, bad, c.says)
				}
				if f.Mirror.Head != head {
					return fmt.Errorf("the mirror's head is %s", f.Mirror.Head)
				}
				return nil
			})
			unchanged(t)
			w.gitDo(w.work, "revert", "--no-edit", "HEAD")
			w.gitDo(w.work, "push", "-q", "origin", "main")
			head = strings.TrimSpace(w.gitDo(w.work, "rev-parse", "HEAD"))
			w.eventually("the mirror takes the revert", func() error {
				f, err := fleet.Read(t.Context(), w.store, fleet.Filter{})
				if err == nil && (f.Mirror == nil || f.Mirror.Head != head || f.Mirror.Error != "") {
					err = fmt.Errorf("the mirror's state is %+v", f.Mirror)
				}
				return err
			})
		})
	}
}

// Consul, S3 and Git away, each in turn: nothing changes on nodes, everything says so, and all recovers by itself.
func TestOutagesChangeNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1", "web-2")
	mirror := w.startMirror("mirror-1")
	for _, node := range []string{"web-1", "web-2"} {
		w.startAgent(node)
	}
	w.release("first", w.publish("app", "1"))
	w.live("app", "1", "web-1", "web-2")
	ctx, stop := context.WithCancel(t.Context())
	reads := w.reader(ctx, filepath.Join(w.srv("web-1"), "app"), filepath.Join(w.srv("web-2"), "app"))
	defer func() { stop(); t.Logf("dest was read %d times and always whole", reads()) }()

	t.Run("Git", func(t *testing.T) {
		w.git.setAway(true)
		w.eventually("the mirror says so", func() error {
			f, err := fleet.Read(t.Context(), w.store, fleet.Filter{})
			if err == nil && (f.Mirror == nil || f.Mirror.Error == "") {
				err = fmt.Errorf("the mirror's state is %+v", f.Mirror)
			}
			return err
		})
		w.git.setAway(false)
		w.release("second", w.publish("app", "2"))
		w.live("app", "2", "web-1", "web-2")
	})
	t.Run("S3", func(t *testing.T) {
		three := w.publish("app", "3")
		w.s3.Stop()
		w.release("third", three)
		w.reported("web-1", "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateRetrying || u.Error == "" || u.Version != "2" {
				return "it does not say that it retries"
			}
			return ""
		})
		if v, err := readTree(filepath.Join(w.srv("web-1"), "app")); err != nil || v != "2" {
			t.Errorf("%q, %v is live while S3 is away, want 2", v, err)
		}
		w.s3.Restart()
		w.live("app", "3", "web-1", "web-2")
	})
	t.Run("Consul", func(t *testing.T) {
		server := w.consul.Servers[0]
		server.Suspend()
		w.release("fourth", w.publish("app", "4"))
		w.eventually("the mirror's log says so", func() error {
			if !strings.Contains(mirror.logged(), "level=WARN") && !strings.Contains(mirror.logged(), "level=ERROR") {
				return fmt.Errorf("no warning in it")
			}
			return nil
		})
		// A node that boots now comes up with what it last knew.
		w.processes["web-2"].kill()
		w.startAgent("web-2")
		if v, err := readTree(filepath.Join(w.srv("web-2"), "app")); err != nil || v != "3" {
			t.Errorf("%q, %v is live while Consul is away, want 3", v, err)
		}
		w.eventually("its agent says what it goes by", func() error {
			out, errs, code := w.kedgeWith(nil, "explain", "app", "--state-dir", filepath.Join(w.dir, "web-2", "state"))
			text := strings.Join(strings.Fields(out), " ")
			if code != exitDone || !strings.Contains(text, "prod/web/app on web-2 runs 3") ||
				!strings.Contains(text, "! store desired/prod/web/ from last known state of") {
				return fmt.Errorf("exit %d: %s%s", code, out, errs)
			}
			return nil
		})
		server.Resume()
		w.live("app", "4", "web-1", "web-2")
	})
}

// Any process is killed at any time while thirty releases are pushed: in the end all is converged, and dest was
// never absent, partial or mixed.
func TestKilledAtRandom(t *testing.T) {
	t.Parallel()
	const releases = 30
	nodes := []string{"web-1", "web-2", "web-3"}
	w := newWorld(t, nodes...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	restart := map[string]func() *process{
		"mirror-1": func() *process { return w.startMirror("mirror-1") },
		"mirror-2": func() *process { return w.startMirror("mirror-2") },
	}
	for _, node := range nodes {
		restart[node] = func() *process { return w.startAgent(node) }
	}
	names := []string{"mirror-1", "mirror-2", "web-1", "web-2", "web-3"}
	for _, name := range names {
		restart[name]()
	}
	w.release("0", w.publish("app", "0"))
	w.live("app", "0", nodes...)

	ctx, stop := context.WithCancel(t.Context())
	var dests []string
	for _, node := range nodes {
		dests = append(dests, filepath.Join(w.srv(node), "app"))
	}
	reads := w.reader(ctx, dests...)
	kills := 0
	killed := make(chan struct{})
	defer func() { stop(); <-killed }() // before the world ends
	// Once all is pushed, kills become rarer: on a busy machine a process takes seconds to start, and may live for less.
	const rarer = 20 * time.Millisecond // for each kill
	var pushed atomic.Bool
	go func() {
		defer close(killed)
		var extra time.Duration
		for ctx.Err() == nil {
			name := names[random.IntN(len(names))]
			w.mu.Lock()
			p := w.processes[name]
			w.mu.Unlock()
			p.kill()
			kills++
			restart[name]()
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(100+random.IntN(500))*time.Millisecond + extra):
			}
			if pushed.Load() {
				extra += rarer
			}
		}
	}()
	for i := 1; i <= releases; i++ {
		w.release(fmt.Sprint(i), w.publish("app", fmt.Sprint(i)))
	}
	pushed.Store(true)
	w.live("app", fmt.Sprint(releases), nodes[0])
	stop()
	<-killed
	n := reads()
	w.live("app", fmt.Sprint(releases), nodes...)
	for _, node := range nodes {
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged || u.Version != fmt.Sprint(releases) {
				return "it is not converged"
			}
			return ""
		})
		for _, left := range leftovers(t, filepath.Join(w.srv(node), "app.releases")) {
			t.Errorf("%s: %s was left behind", node, left)
		}
	}
	t.Logf("%d kills over %d releases; dest was read %d times and always whole", kills, releases, n)
}

// leftovers names what a killed agent left half made below a directory of releases.
func leftovers(t *testing.T, dir string) []string {
	entries, err := os.ReadDir(filepath.Join(dir, ".kedge"))
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "staging-") {
			left = append(left, e.Name())
		}
	}
	return left
}

// A Consul token without rights changes nothing and is named as the cause.
func TestTokenWithoutRights(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1")
	w.release("first", w.publish("app", "1"))
	w.beforeAnyMirror()
	w.startMirror("mirror-1")
	w.startAgent("web-1")
	w.live("app", "1", "web-1")
	w.processes["web-1"].kill()
	client := w.consul.Clients[0]
	w.release("second", w.publish("app", "2"))
	blind := w.start("web-1", append(client.Env(w.consul.Token("")), append(w.s3.Env(), "SRV="+w.srv("web-1"))...),
		"agent", "--node", "web-1", "--stage", "prod", "--roles", "web", "--state-dir", filepath.Join(w.dir, "web-1", "state"))
	w.eventually("the agent says so", func() error {
		if !strings.Contains(blind.logged(), "permission denied") {
			return fmt.Errorf("its log does not name the cause")
		}
		return nil
	})
	if v, err := readTree(filepath.Join(w.srv("web-1"), "app")); err != nil || v != "1" {
		t.Errorf("%q, %v is live, want 1", v, err)
	}
	blind.kill()
	w.startAgent("web-1")
	w.live("app", "2", "web-1")
}

// beforeAnyMirror looks at a store in which nothing was ever written, with an operator's token and with none.
func (w *world) beforeAnyMirror() {
	w.t.Helper()
	nobody := w.consul.Env(w.consul.Token(""))
	for _, c := range []struct {
		env  []string
		args []string
		code int
		says []string
	}{
		{nil, []string{"diff", w.work}, exitDone, []string{"create", "prod/web/app", "no mirror has run yet"}},
		{nil, []string{"status"}, exitDone, []string{"has taken no commit yet", "No units."}},
		{nil, []string{"explain", "prod/web/app"}, exitFailed, []string{"no mirror has taken a commit yet"}},
		{nobody, []string{"diff", w.work}, exitFailed, []string{"permission denied", "CONSUL_HTTP_TOKEN"}},
		{nobody, []string{"status"}, exitFailed, []string{"permission denied", "CONSUL_HTTP_TOKEN"}},
	} {
		run := func() (string, string, int) { return w.kedge(c.args...) }
		if c.env != nil {
			run = func() (string, string, int) { return w.kedgeWith(c.env, c.args...) }
		}
		out, errs, code := run()
		for _, says := range c.says {
			if code != c.code || !strings.Contains(strings.Join(strings.Fields(out+errs), " "), says) {
				w.t.Errorf("kedge %s: exit code %d, want %d and %q:\n%s%s",
					strings.Join(c.args, " "), code, c.code, says, out, errs)
			}
		}
	}
}
