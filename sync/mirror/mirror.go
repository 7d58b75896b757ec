package mirror

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
	"kedge/kv"
)

// Config configures a Mirror.
type Config struct {
	Store kv.Store
	// Repo is https://…, ssh://… or git@HOST:PATH, or the path of a local bare repo, which is watched. Branch: default main.
	Repo, Branch string
	// Every is the time between polls, ±20 %; default 15 s (a watched local repo: 60 s, as a safety net).
	Every time.Duration
	// Name is shown as the lease's holder; default the host's name.
	Name string
	// LeaseTTL default 15 s.
	LeaseTTL time.Duration
	// SSHKey is a private key's file, KnownHosts a known_hosts file (default ~/.ssh/known_hosts); HTTPS takes KEDGE_GIT_USER and KEDGE_GIT_TOKEN
	// from the environment, or a file named by KEDGE_GIT_TOKEN_FILE.
	SSHKey, KnownHosts string
	// SignedBy is an allowed_signers file; with one, a commit that bears none of its signatures is refused.
	SignedBy string
	// Listen serves webhooks (/hook), /live and /metrics; empty: nowhere.
	Listen  string
	Version string
	Metrics *prometheus.Registry
	Log     *slog.Logger
}

// Mirror copies a deployments repo to the store while it holds the lease. Make it with New, then Run it once.
type Mirror struct{ impl }

func New(c Config) (*Mirror, error) { return newMirror(c) }

// Run mirrors until ctx ends.
func (m *Mirror) Run(ctx context.Context) error { return m.run(ctx) }

// Status is the JSON at mirror/state: what the mirror that holds the lease last did. Written by it alone, on change.
type Status struct {
	Holder string    `json:"holder"`
	Head   string    `json:"head"` // the commit that KV holds
	Author string    `json:"author,omitempty"`
	At     time.Time `json:"at"` // when Head was applied
	// Refused is a newer commit that was not taken, and Error why, or what else is wrong (Git is away).
	Refused string `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
}

// Change is one write that a commit leads to.
type Change struct {
	Unit   deployments.UnitID
	Kind   string // "create", "update", "remove", "keep" (removed from Git, record kept: pruning is off)
	Before *deployments.Record
	After  *deployments.Record
}

// Plan says which records a tree would change, given those that are there; pure.
func Plan(tree *deployments.Tree, commit string, now map[deployments.UnitID]deployments.Record) []Change {
	return plan(tree, commit, now)
}
