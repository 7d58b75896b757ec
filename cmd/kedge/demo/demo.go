// Package demo runs the whole system on one machine with nothing installed. It makes a repo to push
// to, and starts a mirror and agents as processes of their own. One directory stands in for the
// store and another for object storage. The demo shows the fleet and takes keys, or plays an
// operator's day by itself.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/open"
	"kedge/sync/fleet"
	"kedge/sync/web"
)

// ErrNoGit means that git isn't installed, which the demo pushes with.
var ErrNoGit = errors.New("the demo pushes with git, which isn't installed")

// Config configures a Demo.
type Config struct {
	// Dir is an empty or missing directory to use and keep; empty: a temporary one, which Close removes.
	Dir string
	Out io.Writer
	// In is the input for keys. In is read only if it is a terminal and Screen isn't nil.
	In io.Reader
	// Screen shows the fleet on a terminal until ctx ends, and draws it again after every change; nil: Out is no
	// terminal.
	Screen func(ctx context.Context, store kv.Store, draw func(w io.Writer, f *fleet.Fleet, width int)) error
	// Color is set if the screen wants colours.
	Color bool
}

// Demo is a system of its own below one directory:
//
//	deployments.git   the repo that is pushed to       deployments   a clone of it, to work in
//	kv                the store                        releases      what S3 would hold
//	nodes/NAME/srv    where node NAME's app is live    nodes/NAME/state
//	logs              one log a process                kedge         this program, for a second terminal
//	VERSION           a published release's pointer    env           variables for a second terminal
type Demo struct {
	Config
	dir       string
	program   string
	ctx       context.Context
	stop      context.CancelFunc
	store     kv.Store
	objects   *object.Client
	appServer *http.Server
	appURL    string
	web       *web.Web
	webDone   chan error
	mirror    *child
	// pointers are the published releases, by version.
	pointers map[string]deployments.Pointer
	// shown is the last line printed for each node: see printChanges.
	shown map[string]string
	// rollout is appended to the unit file.
	rollout string

	mu    sync.Mutex
	nodes map[string]*child // the agents, by name
	// lastOutput says what the last key does while its command runs, and is the command's output afterwards.
	lastOutput string
}

var demoUnit = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

const (
	firstVersion  = "1.0.0"
	secondVersion = "1.1.0"
	brokenVersion = "1.2.0"
)

// New prepares a demo: its directories, its repo, its store, and the web server of all nodes.
// Neither mirror nor agents run before Live or Walk. The end of ctx or a call of Close ends the
// demo. Close must be called once, unless New returns an error.
func New(ctx context.Context, c Config) (_ *Demo, err error) {
	if _, err := exec.LookPath("git"); err != nil {
		return nil, ErrNoGit
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	d := &Demo{
		Config:   c,
		program:  program,
		nodes:    map[string]*child{},
		pointers: map[string]deployments.Pointer{},
		shown:    map[string]string{},
	}
	if c.Dir == "" {
		if d.dir, err = os.MkdirTemp("", "kedge-demo-"); err != nil {
			return nil, err
		}
	} else {
		if d.dir, err = filepath.Abs(c.Dir); err != nil {
			return nil, err
		}
		if entries, _ := os.ReadDir(d.dir); len(entries) > 0 {
			return nil, fmt.Errorf("%s is not empty: give --dir an empty or missing directory", d.dir)
		}
	}
	d.ctx, d.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	for _, sub := range []string{"kv", "releases", "nodes", "logs", "src"} {
		if err := os.MkdirAll(filepath.Join(d.dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.Symlink(program, filepath.Join(d.dir, "kedge")); err != nil {
		return nil, err
	}
	d.objects = object.New(object.Config{})
	if d.store, err = open.Store(open.Config{URL: "file://" + filepath.Join(d.dir, "kv")}); err != nil {
		return nil, err
	}
	if err := d.serveSite(); err != nil {
		return nil, err
	}
	if err := errors.Join(d.makeRepo(), d.writeEnv()); err != nil {
		return nil, err
	}
	return d, nil
}

// serveSite starts a server that stands in for the web servers of all nodes: /NAME/ is the live
// release of node NAME. The nodes' health checks request it.
func (d *Demo) serveSite() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d.appURL = "http://" + listener.Addr().String()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{node}/{path...}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		http.ServeFileFS(w, r,
			os.DirFS(filepath.Join(d.dir, "nodes", filepath.Base(r.PathValue("node")), "srv", "app")),
			r.PathValue("path"))
	})
	d.appServer = &http.Server{Handler: mux, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	go d.appServer.Serve(listener)
	return nil
}

// serveWeb starts a server that shows the fleet to browsers until the demo ends.
func (d *Demo) serveWeb() (err error) {
	if d.web, err = web.New(web.Config{Store: d.store, Listen: "127.0.0.1:0"}); err != nil {
		return err
	}
	d.webDone = make(chan error, 1)
	go func() { d.webDone <- d.web.Run(d.ctx) }()
	return nil
}

// makeRepo makes the bare repo, and the clone that the demo's user works in.
func (d *Demo) makeRepo() error {
	bare, work := filepath.Join(d.dir, "deployments.git"), filepath.Join(d.dir, "deployments")
	if err := d.git(d.dir, "init", "-q", "--bare", "-b", "main", bare); err != nil {
		return err
	}
	if err := d.git(d.dir, "clone", "-q", bare, work); err != nil {
		return err
	}
	settings := [][2]string{{"user.name", "Demo"}, {"user.email", "demo@localhost"}, {"commit.gpgsign", "false"}}
	for _, setting := range settings {
		if err := d.git(work, "config", setting[0], setting[1]); err != nil {
			return err
		}
	}
	return d.git(work, "checkout", "-q", "-B", "main")
}

func (d *Demo) git(dir string, args ...string) error {
	c := exec.CommandContext(d.ctx, "git", args...)
	c.Dir = dir
	c.Env = append(os.Environ(), "GIT_TERMINAL_PROMPT=0")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// publish packs and publishes a version of the demo's application: a small web site whose health check expects its
// version. The site of brokenVersion doesn't show it, so that the check fails.
func (d *Demo) publish(version string) (artifact.Published, error) {
	src := filepath.Join(d.dir, "src", version)
	shown := version
	if version == brokenVersion {
		shown = "out of order"
	}
	files := map[string]string{
		"VERSION":    shown + "\n",
		"index.html": "<!doctype html><title>kedge demo</title><h1>version " + shown + "</h1>\n",
	}
	for i := range 40 {
		files[fmt.Sprintf("assets/page-%02d.html", i)] = fmt.Sprintf("<p>page %d, the same in every version</p>\n", i)
	}
	for name, content := range files {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return artifact.Published{}, err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return artifact.Published{}, err
		}
	}
	opt := artifact.PublishOptions{
		Dir: src, To: "file://" + filepath.Join(d.dir, "releases"),
		Manifest: deployments.Manifest{
			Name: "app", Version: version, Strategy: deployments.StrategyRelease,
			Dest:     "{{ must_env `DEMO_ROOT` }}/app",
			DestMode: 0o755,
			Health: deployments.Health{
				Timeout: 2 * time.Second,
				Checks: []deployments.Check{{
					HTTP:     &deployments.HTTPCheck{URL: "{{ must_env `DEMO_SITE` }}/VERSION", Contains: version},
					Interval: 100 * time.Millisecond,
				}},
			},
		},
	}
	if p, ok := d.pointers[firstVersion]; ok {
		opt.Since = []deployments.Pointer{p}
	}
	published, err := artifact.Publish(d.ctx, d.objects, opt)
	if err != nil {
		return published, fmt.Errorf("publishing %s: %w", version, err)
	}
	d.pointers[version] = published.Pointer
	return published, os.WriteFile(filepath.Join(d.dir, version), []byte(published.Pointer.String()+"\n"), 0o644)
}

// push sets the version in the deployments repo, commits and pushes. It is an error if that changes nothing.
func (d *Demo) push(version string) error {
	work := filepath.Join(d.dir, "deployments")
	file := filepath.Join(work, demoUnit.Stage, demoUnit.Role, demoUnit.Unit+".yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte("release: "+d.pointers[version].String()+"\n"+d.rollout), 0o644); err != nil {
		return err
	}
	if err := d.git(work, "add", "."); err != nil {
		return err
	}
	if err := d.git(work, "commit", "-q", "-m", "app "+version); err != nil {
		return err
	}
	return d.git(work, "push", "-q", "origin", "main")
}

func (d *Demo) startMirror() (err error) {
	d.mirror, err = d.start("mirror", nil, "mirror", filepath.Join(d.dir, "deployments.git"), "--kv", d.kv())
	return err
}

func (d *Demo) startNode(name string) error {
	root := filepath.Join(d.dir, "nodes", name)
	if err := os.MkdirAll(filepath.Join(root, "srv"), 0o755); err != nil {
		return err
	}
	env := []string{"DEMO_ROOT=" + filepath.Join(root, "srv"), "DEMO_SITE=" + d.appURL + "/" + name}
	c, err := d.start(name, env, "agent", "--kv", d.kv(), "--node", name, "--stage", demoUnit.Stage, "--roles",
		demoUnit.Role, "--sources", "file://"+filepath.Join(d.dir, "releases"), "--state-dir",
		filepath.Join(root, "state"))
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nodes[name] = c
	return nil
}

// agents returns the processes of all nodes, by name.
func (d *Demo) agents() map[string]*child {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.nodes)
}

func (d *Demo) kv() string { return "file://" + filepath.Join(d.dir, "kv") }

// child is a process of the demo.
type child struct {
	cmd  *exec.Cmd
	done chan error
}

func (d *Demo) start(name string, env []string, args ...string) (*child, error) {
	log, err := os.OpenFile(filepath.Join(d.dir, "logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c := exec.CommandContext(d.ctx, d.program, args...)
	c.Env = append(os.Environ(), env...)
	c.Stdout, c.Stderr = log, log
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	// The process has a group of its own: in the demo's group, Ctrl-C would signal it twice, by the terminal and by the
	// demo. Pdeathsig ends it with the demo, even if the demo is killed.
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	running := &child{cmd: c, done: make(chan error, 1)}
	go func() { running.done <- c.Wait() }()
	return running, nil
}

// Close ends the demo's processes, and removes its directory unless Config.Dir named it.
func (d *Demo) Close() error {
	d.stop()
	for _, c := range d.agents() {
		<-c.done
	}
	if d.mirror != nil {
		<-d.mirror.done
	}
	var errs []error
	if d.web != nil {
		errs = append(errs, <-d.webDone)
	}
	if d.appServer != nil {
		errs = append(errs, d.appServer.Close())
	}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	if d.Dir == "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}
