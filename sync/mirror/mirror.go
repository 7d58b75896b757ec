// Package mirror copies a deployments repo from Git to the store. A commit is taken whole or not at all; what
// differs is written in transactions that are fenced by a lease, so that of several mirrors one works, and one that
// lost its lease can't change a key, whatever it believes. The one thing that a mirror writes without it is
// mirror/hook, which passes a webhook on to the mirror that has it.
//
// It is driven by state, not by events: whatever wakes it (a push, a poll, a change of the store, the clock), it
// looks at the newest commit and at what the store holds, and writes the difference. A transaction that was cut
// short is finished by the next look, a record changed by hand is put back, and a mirror that takes over begins in
// the same way.
//
// What is not taken: a commit with any mistake in it; one that bears no signature of Config.SignedBy, where that is
// set; one that does not descend from the last (allow_rewind), or that removes too many units at once
// (max_removed), both as the commit says that was taken last; one that names a release that does more than the
// commit's own kedge.yaml allows for its stage (dests, users, commands), for which the mirror reads the manifests
// of what the commit changes, and waits while it can't; with Releases.Trust, one whose releases bear no signature
// that counts waits as well. The signature asked for is the newest commit's: it vouches for the whole tree. Git
// binds no signature to a branch: any signed commit that descends from the last can be pushed by whoever may push.
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
	"kedge/sync/git"
	"kedge/sync/git/transport"
	"kedge/sync/mirror/inspect"
	"kedge/sync/mirror/webhook"
	"kedge/sync/trace"
)

// Config configures a Mirror.
type Config struct {
	Store kv.Store
	// Repo is https://…, ssh://… or git@HOST:PATH, of which no object beyond 16 MiB is kept, or the path of a local
	// bare repo, which is watched. Branch: default main.
	Repo, Branch string
	// Path is the directory of the repository that holds STAGE/ROLE/UNIT.yaml and kedge.yaml, for a monorepo; default:
	// all of it.
	Path string
	// Every is the time between polls, ±20 %; default 15 s (a watched local repo: 60 s, as a safety net).
	Every time.Duration
	// Accept is the full hash of a commit that is taken, once it is the branch's head, whatever its history and the
	// units that it removes: the way in for a repository that was replaced. Where the store holds a commit that
	// follows it, it counts for nothing.
	Accept string
	// Name is shown as the lease's holder; default the host's name.
	Name string
	// LeaseTTL default 15 s.
	LeaseTTL time.Duration
	// SSHKey is a private key's file (default: the SSH agent), KnownHosts a known_hosts file (default
	// ~/.ssh/known_hosts). HTTPS takes KEDGE_GIT_USER and KEDGE_GIT_TOKEN from the environment, or a file named by
	// KEDGE_GIT_TOKEN_FILE, and trusts the authorities of the file named by GIT_SSL_CAINFO beside the system's.
	SSHKey, KnownHosts string
	// CacheDir keeps a remote repo's objects, so that a mirror that starts while Git is away can go on; one mirror a
	// directory. Default: a temporary one, which goes with Run.
	CacheDir string
	// SignedBy is an allowed_signers file; with one, a commit that bears none of its signatures is refused.
	SignedBy string
	// SignedByPGP is a file of armoured OpenPGP public keys, whose signatures count as well.
	SignedByPGP string
	// Listen serves webhooks (/hook), /live and /metrics; empty: nowhere. ":0" is fine: see Addr. Webhooks need a
	// secret, in KEDGE_WEBHOOK_SECRET or the file named by KEDGE_WEBHOOK_SECRET_FILE.
	Listen string
	// Releases reads the manifests of what a commit names anew, of stages that kedge.yaml bounds by more than sources;
	// with Trust of all. Its Objects are by default what object.New gives.
	Releases inspect.Releases
	// Snapshot, where set, is given the records that the mirror that holds the lease wrote, after they changed: for
	// nodes that boot while the store is away. One call at a time, the newest state; an error is logged, and it is
	// tried again.
	Snapshot func(ctx context.Context, desired []kv.Entry) error
	// Leading, where set, is run while this mirror holds the lease; it returns when its context ends.
	Leading func(ctx context.Context) error
	Version string
	// Env reads an environment variable; default os.Getenv.
	Env     func(string) string
	Metrics *prometheus.Registry // nil: none
	// Trace takes the spans of pushes and rollouts; nil: nothing is traced. Its owner runs it.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none
}

// Mirror copies a deployments repo to the store while it holds the lease. Make it with New, then Run it once.
type Mirror struct {
	c        Config
	branch   *follower
	metrics  *metrics
	units    *unitMetrics
	listener net.Listener      // nil: none
	hooks    *webhook.Receiver // of webhooks
	hurry    wait.Signal       // asks the leader to look for releases anew

	hookPause, patience, forgetAfter, rebuildWait time.Duration // as the constants of these names

	mu    sync.Mutex
	holds kv.Lease // the lease that this mirror works under; nil: none
}

// The times of a mirror; tests have their own.
const (
	// A release that isn't there, or can't be read, is looked for after defaultPatience, and then less and less often,
	// up to maxPatience on average: its upload may take long, or never have been meant. A new commit begins anew, and so
	// does a webhook.
	defaultPatience = 5 * time.Second
	maxPatience     = time.Minute
	// defaultForgetAfter is how long a node that died stays in status/, for people to see: longer than a weekend.
	defaultForgetAfter = 72 * time.Hour
	// defaultRebuildWait is how long nodes have to report before a record is made from what they say: after an outage
	// of the store they come back one by one.
	defaultRebuildWait = 5 * time.Second
)

// New checks c, and listens. It does not wait for Git or the store to be reachable.
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
			return nil, fmt.Errorf("name of this host: %w", err)
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
		c:           c,
		metrics:     newMetrics(c.Metrics),
		units:       newUnitMetrics(c.Metrics),
		hurry:       wait.NewSignal(),
		hookPause:   webhook.Pause,
		patience:    defaultPatience,
		forgetAfter: defaultForgetAfter,
		rebuildWait: defaultRebuildWait,
	}
	m.branch = &follower{source: source, repo: c.Repo, branch: c.Branch, signers: signers, metrics: m.metrics, log: c.Log,
		pollNow: wait.NewSignal(), changed: make(chan struct{})}
	m.hooks = webhook.New(webhook.Config{Secret: secret, Store: c.Store, Name: c.Name, Log: c.Log, Leads: m.leads,
		Heed: m.heed, Count: m.metrics.hooked})
	if c.Listen != "" {
		if m.listener, err = net.Listen("tcp", c.Listen); err != nil {
			return nil, errors.Join(fmt.Errorf("listen: %w", err), source.Close())
		}
	}
	return m, nil
}

// Addr is the address of Listen; empty without one.
func (m *Mirror) Addr() string {
	if m.listener == nil {
		return ""
	}
	return m.listener.Addr().String()
}

// Trigger asks for a poll at once.
func (m *Mirror) Trigger() { m.branch.pollNow.Set() }

// Run mirrors until ctx ends, and returns nil then. Trouble with Git or the store doesn't end it.
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

// serve answers on the listener until ctx ends.
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
		ErrorLog:          slog.NewLogLogger(m.c.Log.Handler(), slog.LevelDebug),
	}
	defer context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})()
	if err := server.Serve(m.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", m.Addr(), err)
	}
	return nil
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

// live answers that the process runs, with whether it leads and what it read of the branch.
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

// heed makes this mirror read the branch now, and look for missing releases.
func (m *Mirror) heed() {
	m.Trigger()
	m.hurry.Set()
}

// leads is false as soon as the lease has ended, though what it was held for may still be ending.
func (m *Mirror) leads() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.holds != nil && m.holds.Context().Err() == nil
}
