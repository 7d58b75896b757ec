// Package mirror copies a deployments repo from Git to the store. A commit is taken as a whole or
// not at all. Differences are written in transactions fenced by a lease: of several mirrors one
// works, and one that lost its lease can't change a record. Two kinds of writes of this package
// aren't fenced: it adds missing folder keys, and a mirror that doesn't lead writes mirror/hook,
// which passes a webhook on to the mirror that leads.
//
// The mirror is driven by state, not by events. After each wake-up (a push, a poll, a change of the
// store, the clock) it takes the newest commit if it may. Then it compares the last commit taken
// with what the store holds, and writes the difference. So the next round finishes a commit that
// was written in part, even by another mirror, and restores a record that was changed by hand.
//
// A commit is not taken if it contains any mistake, or if signers are configured and none has
// signed it. A commit is also refused if it doesn't descend from the last commit taken, or if it
// removes the records of too many units. Both rules depend on the last commit's settings:
// allow_rewind and max_removed. Neither rule applies to a commit that Config.Accept names.
//
// Nor is a commit taken if a release does more than the commit's own kedge.yaml allows for the
// stage (dests, users, commands). To check that, the mirror reads manifests in stages with such
// bounds: those of releases that the commit introduces, or for whose stage it changes the bounds.
// The commit waits while one of these can't be read. With Releases.Trust, the mirror reads such
// manifests in all stages, and the commit also waits while one of them has no valid signature.
//
// Only the newest commit's signature is checked, as it covers the whole tree. Git binds no
// signature to a branch: whoever may push can push any signed commit that descends from the last.
package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/object"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/conns"
	"kedge/sync/git"
	"kedge/sync/git/transport"
	"kedge/sync/mirror/inspect"
	"kedge/sync/mirror/webhook"
	"kedge/sync/trace"
)

// Config configures a Mirror.
type Config struct {
	Store kv.Store
	// Repo is the repository's address: https://…, ssh://… or git@HOST:PATH, or the path of a local repo, which is
	// watched. Of a remote repository no object larger than 16 MiB is kept. Branch is main by default.
	Repo, Branch string
	// Path is the directory of the repository that holds STAGE/ROLE/UNIT.yaml and kedge.yaml, for a monorepo;
	// default: the root.
	Path string
	// Every is the time between polls, ±20 %; default 15 s (a local repo: 60 s, as a safety net
	// beside the watch). A local repo that can't be watched is polled at least each second.
	Every time.Duration
	// Accept is the full hash of a commit, for a repository that was replaced. If that commit is
	// the branch's head, its history and the units that it removes aren't checked; everything else
	// is. Accept has no effect once the store holds that commit, or one that descends from it.
	Accept string
	// Name is shown as the lease's holder; default the host's name.
	Name string
	// LeaseTTL is the lease's time to live; default 15 s. Consul takes 10 s to 24 h.
	LeaseTTL time.Duration
	// SSHKey is the file of a private key; default: the SSH agent. KnownHosts is a known_hosts file; default:
	// ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts, as far as they exist. What https needs is read from Env: see
	// git.Config. The authorities in the file that GIT_SSL_CAINFO names are trusted in addition to the system's.
	SSHKey, KnownHosts string
	// CacheDir is a directory that keeps a remote repo's objects, so that a mirror that starts while
	// Git is away can go on. It also keeps which commits had a valid signature. Each mirror needs a
	// directory of its own. Default: a temporary directory for the objects, which Run removes.
	CacheDir string
	// SignedBy is an allowed_signers file. If it or SignedByPGP is set, a commit that none of their signers has signed is
	// refused.
	SignedBy string
	// SignedByPGP is a file of armoured OpenPGP public keys, whose signatures count as well.
	SignedByPGP string
	// Listen is the address that serves webhooks (/hook), /live and, if Metrics is set, /metrics; empty: none. ":0"
	// chooses a free port: see Addr. Webhooks need a secret, in KEDGE_WEBHOOK_SECRET or the file named by
	// KEDGE_WEBHOOK_SECRET_FILE.
	Listen string
	// Releases reads the manifests of the releases that a commit introduces or bounds anew. With Trust it reads all of
	// them. Without Trust it reads only those of stages that kedge.yaml bounds by more than sources. Releases.Objects
	// defaults to object.New.
	Releases inspect.Releases
	// Snapshot, if set, is called with the records that the leading mirror wrote, or found as Git asks, after they changed
	// and once an hour. The snapshot serves nodes that boot while the store is away. Calls don't overlap, and get the
	// newest state. An error is logged and the call is retried.
	Snapshot func(ctx context.Context, desired []kv.Entry) error
	// Leading, if set, runs while this mirror holds the lease; it must return when its context ends. Its error ends the
	// leadership. It must commit its writes with the lease, as another mirror may lead already.
	Leading func(ctx context.Context, lease kv.Lease) error
	Version string // shown at /live
	// Env reads an environment variable; default os.Getenv.
	Env     func(string) string
	Metrics *prometheus.Registry // nil: none
	// Trace sends the spans of pushes and rollouts; nil: nothing is traced. The caller runs it.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none
}

// Mirror copies a deployments repo to the store while it holds the lease. Create it with New and call Run once.
type Mirror struct {
	c           Config
	branch      *follower
	metrics     *metrics
	unitMetrics *unitMetrics
	listener    net.Listener // nil: none
	hooks       *webhook.Receiver
	recheck     wait.Signal // makes the leader look for missing releases soon

	hookPause, releaseRetry, forgetAfter, rebuildWait time.Duration // default to webhook.Pause and the constants below

	mu        sync.Mutex
	heldLease kv.Lease // the lease that this mirror holds; nil: none
}

// Default durations; tests have their own.
const (
	// defaultReleaseRetry is the average time until the mirror looks again for a release that is
	// missing, can't be read or has no valid signature. With each try it grows, up to maxReleaseRetry:
	// the upload may take long or may never come. A new commit or a webhook resets it.
	defaultReleaseRetry = 5 * time.Second
	maxReleaseRetry     = time.Minute
	// defaultForgetAfter is how long the entry of a node that died stays in status/ for people to see: longer than a
	// weekend.
	defaultForgetAfter = 72 * time.Hour
	// defaultRebuildWait is how long nodes have to report before a missing or lost record is
	// written, or a rollout begins: after an outage of the store they come back one by one.
	defaultRebuildWait = 5 * time.Second
)

// New checks c and opens the listener. It does not wait for Git or the store.
func New(c Config) (*Mirror, error) {
	if c.Store == nil || c.Repo == "" {
		return nil, errors.New("a mirror needs a store and a repository")
	}
	if c.Branch == "" {
		c.Branch = "main"
	}
	if c.Accept != "" && !git.IsHash(c.Accept) {
		return nil, fmt.Errorf("accept %q: want a commit's full hash", c.Accept)
	}
	if c.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("reading this host's name: %w", err)
		}
		c.Name = name
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 15 * time.Second
	}
	if c.Env == nil {
		c.Env = os.Getenv
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Releases.Objects == nil {
		c.Releases.Objects = object.New(object.Config{Log: c.Log})
	}
	secret, err := transport.Secret(c.Env, "KEDGE_WEBHOOK_SECRET")
	if err != nil {
		return nil, err
	}
	signers, err := git.OpenSigners(c.SignedBy, c.SignedByPGP, c.CacheDir)
	if err != nil {
		return nil, err
	}
	source, err := git.Open(
		git.Config{Repo: c.Repo, Branch: c.Branch, Path: c.Path, Every: c.Every, SSHKey: c.SSHKey, KnownHosts: c.KnownHosts,
			CacheDir: c.CacheDir, Env: c.Env, Log: c.Log},
	)
	if err != nil {
		return nil, err
	}
	m := &Mirror{
		c:            c,
		metrics:      newMetrics(c.Metrics),
		unitMetrics:  newUnitMetrics(c.Metrics),
		recheck:      wait.NewSignal(),
		hookPause:    webhook.Pause,
		releaseRetry: defaultReleaseRetry,
		forgetAfter:  defaultForgetAfter,
		rebuildWait:  defaultRebuildWait,
	}
	m.branch = &follower{source: source, repo: c.Repo, branch: c.Branch, signers: signers, metrics: m.metrics, log: c.Log,
		pollNow: wait.NewSignal(), changed: make(chan struct{}), gaps: map[question]*gap{}}
	m.hooks = webhook.New(webhook.Config{Secret: secret, Store: c.Store, Name: c.Name, Log: c.Log, Leads: m.leads,
		Received: m.refresh, Count: m.metrics.countWebhook})
	if c.Listen != "" {
		if m.listener, err = net.Listen("tcp", c.Listen); err != nil {
			return nil, errors.Join(fmt.Errorf("listen: %w", err), source.Close())
		}
	}
	return m, nil
}

// Addr returns the address that the mirror listens on, with the port that was chosen for ":0"; empty: Listen is empty.
func (m *Mirror) Addr() string {
	if m.listener == nil {
		return ""
	}
	return m.listener.Addr().String()
}

// Trigger makes the mirror poll the branch without waiting for Config.Every.
func (m *Mirror) Trigger() { m.branch.pollNow.Set() }

// Run mirrors until ctx ends, and then returns nil. Errors of Git or the store don't end it; an error of the HTTP
// server does, and is returned.
func (m *Mirror) Run(ctx context.Context) error {
	defer m.branch.source.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.serve(ctx) })
	g.Go(func() error { m.branch.source.Watch(ctx, m.Trigger); return nil })
	g.Go(func() error { m.branch.run(ctx); return nil })
	g.Go(func() error { m.hooks.PassOn(ctx); return nil })
	g.Go(func() error { m.lead(ctx); return nil })
	return g.Wait()
}

// maxConns bounds the connections to a mirror's address: a new one replaces the oldest.
const maxConns = 200

// serve serves HTTP on the listener, if there is one, until ctx ends; then it returns nil.
func (m *Mirror) serve(ctx context.Context) error {
	if m.listener == nil {
		<-ctx.Done()
		return nil
	}
	server := &http.Server{
		Handler:           m.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnState:         (&conns.Limit{Max: maxConns}).Note,
		ErrorLog:          slog.NewLogLogger(m.c.Log.Handler(), slog.LevelDebug),
	}
	return conns.Serve(ctx, server, m.listener, 2*time.Second)
}

func (m *Mirror) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /hook", m.hooks)
	mux.HandleFunc("GET /live", m.live)
	if m.c.Metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(m.c.Metrics, promhttp.HandlerOpts{}))
	}
	return mux
}

// live answers GET /live in JSON: whether this mirror leads, the branch's head as last read, why
// that head may be out of date, and the version.
func (m *Mirror) live(w http.ResponseWriter, _ *http.Request) {
	leads, branch := m.leads(), m.branch.state()
	answer := struct {
		Leading bool   `json:"leading"`
		Head    string `json:"head"`
		Error   string `json:"error,omitempty"`
		Version string `json:"version,omitempty"`
	}{leads, branch.head, text(branch.away), m.c.Version}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

// refresh makes this mirror poll the branch and, if it leads, look for missing releases soon.
func (m *Mirror) refresh() {
	m.Trigger()
	m.recheck.Set()
}

// leads reports whether this mirror holds the lease. It is false as soon as the lease has ended, even if the leader's
// work is still ending.
func (m *Mirror) leads() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.heldLease != nil && m.heldLease.Context().Err() == nil
}
