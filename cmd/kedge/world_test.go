package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv"
	"kedge/kv/kvtest"
)

// TestMain removes the programs and the packages that tests had made.
func TestMain(m *testing.M) {
	code := tooltest.Main(m)
	for _, p := range []*program{&asTested, &asReleased} {
		os.RemoveAll(p.dir) // "": none was built
	}
	os.RemoveAll(madePackages.dir)
	os.Exit(code)
}

// program is kedge's program, built once for all tests that start it.
type program struct {
	once sync.Once
	dir  string
	err  error
}

var asTested, asReleased program

// testedProgram returns the path of kedge's program, with the race detector if the tests have it.
func testedProgram(t testing.TB) string {
	t.Helper()
	if kvtest.RaceDetector {
		return asTested.build(t, []string{"-race"})
	}
	return releasedProgram(t)
}

// releasedProgram returns the path of kedge's program as it is released: without the race detector, which takes most
// of the time of a process that ends at once.
func releasedProgram(t testing.TB) string {
	t.Helper()
	return asReleased.build(t, []string{"-trimpath"}, "CGO_ENABLED=0")
}

func (p *program) build(t testing.TB, flags []string, env ...string) string {
	t.Helper()
	p.once.Do(func() {
		if p.dir, p.err = os.MkdirTemp("", "kedge-program-"); p.err != nil {
			return
		}
		build := exec.Command("go", slices.Concat([]string{"build"}, flags, []string{"-o", p.path(), "."})...)
		build.Env = append(os.Environ(), env...)
		if out, err := build.CombinedOutput(); err != nil {
			p.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if p.err != nil {
		t.Fatalf("build kedge: %v", p.err)
	}
	return p.path()
}

func (p *program) path() string { return filepath.Join(p.dir, "kedge") }

// world is a whole installation of real parts: a Consul server with default deny and a client agent a node, an S3
// server, a bare Git repo behind HTTPS, and kedge's mirror and agents as processes with the tokens that
// deployments/consul ships.
type world struct {
	t       testing.TB
	dir     string
	consul  *kvtest.Consul
	s3      *objecttest.Server
	objects *object.Client
	git     *gitHost
	work    string // the clone that is pushed from
	program string // what its processes run; empty: testedProgram
	store   kv.Store

	pushing   sync.Mutex // for tests that push side by side
	mu        sync.Mutex
	processes map[string]*process // the newest of each name
	started   []*process
	tokens    map[string]string
}

var webApp = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

// newWorld starts Consul, S3 and Git; mirror and agents are the test's to start.
func newWorld(t testing.TB, nodes ...string) *world {
	t.Helper()
	return newWorldOn(t, kvtest.ConsulOptions{ACL: true, Clients: nodes})
}

// newWorldOn starts a Consul of another kind.
func newWorldOn(t testing.TB, consul kvtest.ConsulOptions) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a real Consul, S3 and Git: left out with -short")
	}
	w := &world{t: t, dir: t.TempDir(), processes: map[string]*process{}, tokens: map[string]string{}}
	// Three servers to start: side by side.
	var wg sync.WaitGroup
	wg.Go(func() { w.s3 = objecttest.Start(t) })
	wg.Go(func() { w.git = newGitHost(t) })
	w.consul = kvtest.StartConsul(t, consul)
	wg.Wait()
	w.objects = w.s3.Client()
	w.store = w.consul.Open(w.consul.RootToken)
	w.work = filepath.Join(w.dir, "work")
	w.gitDo(w.dir, "clone", "-q", w.git.url, w.work)
	w.gitDo(w.work, "checkout", "-q", "-B", "main")
	t.Cleanup(w.end)
	return w
}

// process is a kedge process of a world.
type process struct {
	name string
	cmd  *exec.Cmd
	log  *bytes.Buffer
	mu   *sync.Mutex
	done chan struct{}
	err  error
}

// lockedWriter lets a test read a log while it is written.
type lockedWriter struct {
	mu *sync.Mutex
	w  *bytes.Buffer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// start starts kedge with args, under name; what it logs is shown where the test fails.
func (w *world) start(name string, env []string, args ...string) *process {
	w.t.Helper()
	p := &process{name: name, cmd: exec.Command(w.self(), args...), log: &bytes.Buffer{}, mu: &sync.Mutex{}, done: make(chan struct{})}
	temp := filepath.Join(w.dir, "tmp") // what is killed leaves it to the test's end to clean up
	if err := os.MkdirAll(temp, 0o755); err != nil {
		w.t.Fatal(err)
	}
	p.cmd.Env = slices.Concat(baseEnv(), env, []string{"TMPDIR=" + temp})
	p.cmd.Stdout, p.cmd.Stderr = lockedWriter{p.mu, p.log}, lockedWriter{p.mu, p.log}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		w.t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.processes[name] = p
	w.started = append(w.started, p)
	return p
}

func (w *world) self() string {
	if w.program != "" {
		return w.program
	}
	return testedProgram(w.t)
}

// baseEnv is this process's environment without what would reach another Consul or S3.
func baseEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "CONSUL_") || strings.HasPrefix(s, "AWS_") || strings.HasPrefix(s, "KEDGE_") || strings.HasPrefix(s, "NOTIFY_SOCKET")
	})
}

// kill ends a process by SIGKILL and waits until it is gone.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// stop ends a process as systemd would, and reports how.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return p.err
	case <-time.After(30 * time.Second):
		p.kill()
		return fmt.Errorf("%s did not end within 30 s of SIGTERM", p.name)
	}
}

func (p *process) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func (w *world) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.processes {
		p.kill()
	}
	if !w.t.Failed() {
		return
	}
	for name, p := range w.processes {
		log := p.logged()
		if len(log) > 6000 {
			log = "…" + log[len(log)-6000:]
		}
		w.t.Logf("log of %s:\n%s", name, log)
	}
}

// token gives a party's token, the same at each call: it serves while Consul is away as well.
func (w *world) token(party string, vars deployments.RuleVars) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	name := party + " " + vars.Node
	if w.tokens[name] == "" {
		w.tokens[name] = w.consul.Token(deployments.ConsulRules(party, vars))
	}
	return w.tokens[name]
}

// startMirror starts a mirror with the mirror's own token.
func (w *world) startMirror(name string, more ...string) *process {
	w.t.Helper()
	token := w.token("mirror", deployments.RuleVars{Node: w.consul.Servers[0].Name})
	env := slices.Concat(w.consul.Env(token), []string{"SSL_CERT_FILE=" + w.git.caFile})
	return w.start(name, env, slices.Concat([]string{"mirror", w.git.url, "--every", "300ms", "--lease-ttl", "10s", "--name", name}, more)...)
}

// startAgent starts the agent of a node, with the node's own token, on the node's own Consul client agent.
func (w *world) startAgent(node string, more ...string) *process {
	w.t.Helper()
	return w.startAgentWith(node, nil, more...)
}

// startAgentWith starts it with variables that go before the world's.
func (w *world) startAgentWith(node string, env []string, more ...string) *process {
	w.t.Helper()
	token := w.token("agent", deployments.RuleVars{Node: node, Stage: "prod", Role: "web"})
	if err := os.MkdirAll(w.srv(node), 0o755); err != nil {
		w.t.Fatal(err)
	}
	env = slices.Concat(w.client(node).Env(token), w.s3.Env(), []string{"SRV=" + w.srv(node)}, env)
	return w.start(node, env, slices.Concat([]string{"agent", "--node", node, "--stage", "prod", "--roles", "web",
		"--state-dir", filepath.Join(w.dir, node, "state")}, more)...)
}

// client is a node's Consul client agent.
func (w *world) client(node string) *kvtest.ConsulNode {
	i := slices.IndexFunc(w.consul.Clients, func(n *kvtest.ConsulNode) bool { return n.Name == node })
	return w.consul.Clients[i]
}

// srv is the directory that a node's releases go live in.
func (w *world) srv(node string) string { return filepath.Join(w.dir, node, "srv") }

// publish publishes a version of a unit: files that all name the version, so that a mixed tree shows.
func (w *world) publish(unit, version string, change ...func(*artifact.PublishOptions)) deployments.Pointer {
	w.t.Helper()
	tree := filepath.Join(w.dir, "trees", unit, version)
	writeTree(w.t, tree, version)
	opt := artifact.PublishOptions{
		Dir: tree, To: w.s3.URL("releases"),
		Manifest: deployments.Manifest{
			Name: unit, Version: version, Strategy: deployments.StrategyRelease,
			Dest: "{{ must_env `SRV` }}/" + unit, DestMode: 0o755,
		},
	}
	for _, f := range change {
		f(&opt)
	}
	published, err := artifact.Publish(w.t.Context(), w.objects, opt)
	if err != nil {
		w.t.Fatalf("publish %s %s: %v", unit, version, err)
	}
	return published.Pointer
}

const treeFiles = 12

func writeTree(t testing.TB, dir, version string) {
	t.Helper()
	for i := range treeFiles {
		path := filepath.Join(dir, fmt.Sprintf("d%d", i%3), fmt.Sprintf("f%d", i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(version+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// readTree reads what is live at dest: the version that all of its files name. A mixed or partial tree is an error.
func readTree(dest string) (string, error) {
	// One resolution of dest: the tree behind it is looked at through a handle that a switch does not move.
	root, err := os.OpenRoot(dest)
	if err != nil {
		return "", err
	}
	defer root.Close()
	version := ""
	for i := range treeFiles {
		name := fmt.Sprintf("d%d/f%d", i%3, i)
		data, err := root.ReadFile(name)
		if err != nil {
			return "", err
		}
		v := strings.TrimSpace(string(data))
		if version == "" {
			version = v
		}
		if v != version {
			return "", fmt.Errorf("%s is of %s beside files of %s", name, v, version)
		}
	}
	return version, nil
}

// push commits units' files and pushes them; nil content removes one.
func (w *world) push(message string, units map[string]*string) string {
	w.t.Helper()
	for id, content := range units {
		path := filepath.Join(w.work, id+".yaml")
		if content == nil {
			if err := os.Remove(path); err != nil {
				w.t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(*content), 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	w.gitDo(w.work, "add", "-A")
	w.gitDo(w.work, "commit", "-q", "--allow-empty", "-m", message)
	w.gitDo(w.work, "push", "-q", "origin", "main")
	return strings.TrimSpace(w.gitDo(w.work, "rev-parse", "HEAD"))
}

// release pushes a commit in which the app of prod/web is p.
func (w *world) release(message string, p deployments.Pointer) string {
	w.t.Helper()
	content := "release: " + p.String() + "\n"
	return w.push(message, map[string]*string{webApp.String(): &content})
}

func (w *world) gitDo(dir string, args ...string) string {
	w.t.Helper()
	out, err := w.git1(dir, args...)
	if err != nil {
		w.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// git1 is git(1).
func (w *world) git1(dir string, args ...string) (string, error) {
	c := exec.Command("git", args...)
	c.Dir = dir
	c.Env = append(baseEnv(), "GIT_SSL_CAINFO="+w.git.caFile, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=Dev", "GIT_AUTHOR_EMAIL=dev@example.com", "GIT_COMMITTER_NAME=Dev", "GIT_COMMITTER_EMAIL=dev@example.com")
	out, err := c.CombinedOutput()
	return string(out), err
}

// eventually waits until try has no error; the last one is the failure.
func (w *world) eventually(what string, try func() error) {
	w.t.Helper()
	await(w.t, what, try)
}

// await pauses for at least as long as a try takes: one that starts a process would else keep a processor busy, while
// what it waits for needs it.
func await(t testing.TB, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		begun := time.Now()
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(min(max(2*time.Since(begun), 25*time.Millisecond), time.Second)):
		}
	}
}

// live waits until nodes serve version of a unit.
func (w *world) live(unit, version string, nodes ...string) {
	w.t.Helper()
	for _, node := range nodes {
		w.eventually(fmt.Sprintf("%s of %s on %s", version, unit, node), func() error {
			got, err := readTree(filepath.Join(w.srv(node), unit))
			if err == nil && got != version {
				err = fmt.Errorf("%s is live", got)
			}
			return err
		})
	}
}

// report reads what a node says of a unit.
func (w *world) report(node, unit string) (deployments.UnitReport, error) {
	entry, err := w.store.Get(w.t.Context(), kv.StatusKey("prod", "web", node))
	if err != nil {
		return deployments.UnitReport{}, err
	}
	report, err := deployments.ParseReport(entry.Value)
	if err != nil {
		return deployments.UnitReport{}, err
	}
	u, ok := report.Units[unit]
	if !ok {
		return u, fmt.Errorf("%s reports nothing of %s", node, unit)
	}
	return u, nil
}

// reported waits until a node's report of a unit is as want says; want returns what is wrong.
func (w *world) reported(node, unit string, want func(deployments.UnitReport) string) {
	w.t.Helper()
	w.eventually(node+"'s report of "+unit, func() error {
		u, err := w.report(node, unit)
		if err != nil {
			return err
		}
		if wrong := want(u); wrong != "" {
			return fmt.Errorf("%s (state %s, running %s, error %q)", wrong, u.State, u.Version, u.Error)
		}
		return nil
	})
}

// versions gives the ModifyIndex of every key of kedge's.
func (w *world) versions() map[string]uint64 {
	w.t.Helper()
	pairs, _, err := w.consul.Client().KV().List("kedge/", nil)
	if err != nil {
		w.t.Fatal(err)
	}
	all := map[string]uint64{}
	for _, p := range pairs {
		all[strings.TrimPrefix(p.Key, "kedge/")] = p.ModifyIndex
	}
	return all
}

// kedge runs a command as an operator would, with the operator's token, and gives what it printed and its exit code.
func (w *world) kedge(args ...string) (stdout, stderr string, code int) {
	w.t.Helper()
	return w.kedgeWith(w.consul.Env(w.token("operator", deployments.RuleVars{})), args...)
}

// kedgeWith runs it with an environment that names the store, or none.
func (w *world) kedgeWith(env []string, args ...string) (stdout, stderr string, code int) {
	w.t.Helper()
	c := exec.CommandContext(w.t.Context(), w.self(), args...)
	c.Env = slices.Concat(baseEnv(), env, w.s3.Env())
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("kedge %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

// gitHost serves a bare repo over HTTPS by git's own http-backend, and can be away for a while.
type gitHost struct {
	url, caFile, bare string
	server            *httptest.Server
	mu                sync.Mutex
	away              bool
}

func newGitHost(t testing.TB) *gitHost {
	dir := t.TempDir()
	h := &gitHost{bare: filepath.Join(dir, "deployments.git"), caFile: filepath.Join(dir, "ca.pem")}
	for _, args := range [][]string{{"init", "-q", "--bare", "-b", "main", h.bare}, {"-C", h.bare, "config", "http.receivepack", "true"}} {
		if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
			t.Errorf("git %v: %v\n%s", args, err, out)
			return h
		}
	}
	execPath, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Errorf("git --exec-path: %v", err)
		return h
	}
	backend := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(execPath)), "git-http-backend"),
		Dir:  dir,
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1"},
	}
	h.server = httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		away := h.away
		h.mu.Unlock()
		if away {
			http.Error(rw, "away", http.StatusBadGateway)
			return
		}
		backend.ServeHTTP(rw, r)
	}))
	t.Cleanup(h.server.Close)
	if err := os.WriteFile(h.caFile, pemOf(h.server), 0o644); err != nil {
		t.Error(err)
	}
	h.url = h.server.URL + "/deployments.git"
	return h
}

func (h *gitHost) setAway(away bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.away = away
}

// reader reads dests in a tight loop, as an application's requests would, and fails the test when one is absent,
// partial or mixed after it was first there.
func (w *world) reader(ctx context.Context, dests ...string) (reads func() int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	n := 0
	for _, dest := range dests {
		wg.Go(func() {
			there := false
			for ctx.Err() == nil {
				_, err := readTree(dest)
				switch {
				case err == nil:
					there = true
				case !there && errors.Is(err, os.ErrNotExist):
				default:
					w.t.Errorf("%s was not whole: %v", dest, err)
					return
				}
				mu.Lock()
				n++
				mu.Unlock()
				if !there {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	return func() int { wg.Wait(); return n }
}
