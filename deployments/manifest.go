package deployments

import (
	"io/fs"
	"time"
)

// Manifest says what a release is and how it goes live. It is a superset of stretcher's manifest. Of stretcher's
// manifests, those with unknown fields, loops in templates, or a src without a checksum are refused here;
// migrating/differences.md has the other differences. kedge publish or a person writes a manifest; it is immutable once
// a pointer names its digest.
type Manifest struct {
	Name, Version string // shown wherever the release is shown
	// Created is when a signed release was made: a node with signers refuses a release below its version floor. Whole
	// seconds, UTC. Zero counts as older than any other time.
	Created time.Time

	// Src is the archive's URL, made absolute against the manifest's own; empty: commands only.
	Src string
	// Checksum is the archive's md5, sha1, sha256 or sha512, told apart by length, in lower-case hexadecimal. It
	// may be empty only if Index is set or Src is empty.
	Checksum string
	// Size is the archive's size in bytes; 0: the manifest does not say.
	Size int64
	// Index and Deltas let an agent fetch only what changed. Without Index the archive is fetched whole.
	Index  *Blob
	Deltas []Delta

	// Dest is an absolute, clean path; empty only without Src. DestMode is the mode of the tree's top directory.
	Dest     string
	DestMode fs.FileMode
	Strategy Strategy
	// Excludes are patterns of rsync, and ExcludeFrom is a file of the tree with such patterns, one
	// a line. Only StrategyRsync uses them.
	Excludes    []string
	ExcludeFrom string
	// Owner is USER, USER:GROUP or :GROUP, by name or number; empty: the user that the agent runs as.
	Owner string
	// Keep is how many old releases stay beside the running and the last good one, at least 1. Default 3.
	Keep int
	// Shared are paths of the tree, relative and clean, that live outside of the releases and stay across them;
	// StrategyRelease only.
	Shared []string
	// Symlinks says whether links of the archive may lead out of the tree.
	Symlinks Symlinks
	// Immutable promises that nothing writes into the live tree, so that the next release may share files by hard
	// link.
	Immutable bool

	Commands Commands
	// Secrets maps names of environment variables of all commands to references, whose values the node reads.
	Secrets map[string]SecretRef `json:",omitempty"`
	Health  Health
	// Drain is how long to wait, after /ready turns 503, before the switch.
	Drain time.Duration

	// Sensitive are the values of variables that must not be shown; see Mask. A manifest's text has no such field:
	// ParseManifest sets Sensitive, and it is stored with the parsed Manifest.
	Sensitive []string `json:"Masked,omitempty"`
}

// Symlinks is where symbolic links of a release may lead. Kedge never follows a link when it writes.
type Symlinks string

const (
	SymlinksInside Symlinks = "inside" // the default: links lead to paths within the tree
	SymlinksAny    Symlinks = "any"    // anywhere, absolute targets included, as in a virtualenv
)

// Blob is an object whose size and digest the manifest fixes.
type Blob struct {
	URL    string // made absolute against the manifest's
	Size   int64  // bytes
	SHA256 Digest
}

// Delta is a blob that turns the release From into this one.
type Delta struct {
	// From is the SHA-256 of the index of the release that the delta starts from.
	From Digest
	Blob
}

// Strategy is how a tree reaches Dest.
type Strategy string

const (
	// StrategyRsync copies over Dest with rsync -a --delete: stretcher's default, and so the default here. Not atomic.
	StrategyRsync Strategy = "rsync"
	// StrategyMv moves the unpacked tree to Dest, where nothing may be yet, as stretcher's mv does.
	StrategyMv Strategy = "mv"
	// StrategyRelease keeps each release in a directory of its own, and makes Dest a symlink that one rename switches.
	StrategyRelease Strategy = "release"
)

// Commands run around a switch, each list in order. The first command that fails ends its list.
type Commands struct {
	// Env are environment variables for all commands, beside those that kedge sets.
	Env map[string]string

	Pre, Post, Success, Failure []Command
}

func (c Commands) lists() [][]Command { return [][]Command{c.Pre, c.Post, c.Success, c.Failure} }

// Command is run by sh -c in a process group of its own.
type Command struct {
	Run string
	// Timeout is how long the command may run before its whole process group is ended. Default: the manifest's
	// commands.timeout, or else 10 minutes; a day in a manifest with only stretcher's fields and strategies, as stretcher
	// has no timeouts.
	Timeout time.Duration
	// User is the user that the command runs as, by name or number; empty: the agent's.
	User string
	// Once prevents a second run after the command was cut off: for commands that restart the agent or the
	// machine.
	Once bool
}

// Health decides whether a switched release stays, and whether a live one is healthy.
type Health struct {
	// Timeout is how long the checks may take to pass, from the end of post; default 60 s.
	Timeout time.Duration
	// StableFor is how long the checks must go on passing. At its end each check is tried once more. Default 0: passing
	// once is enough.
	StableFor time.Duration
	// Every is the time between two rounds of checks while the release is live; default 10 s. Failures is how many rounds
	// in a row must fail before the release counts as unhealthy; default 3.
	Every    time.Duration
	Failures int
	Checks   []Check
}

// Check is a health check of one kind: exactly one of HTTP, TCP, Exec, Systemd and Consul is set.
type Check struct {
	HTTP *HTTPCheck
	TCP  string // HOST:PORT that accepts a connection
	Exec string // sh -c that exits 0
	// User is the user that Exec runs as, by name or number; empty: the agent's.
	User string
	// Systemd names a systemd unit that must be active and must not restart meanwhile.
	Systemd string
	// Consul names a service of this node whose Consul checks must all pass.
	Consul string
	// Interval is the time between two tries at the switch; default 1 s. It is shortened to Health.StableFor, but not
	// below 1 s. Timeout bounds one try; default 5 s.
	Interval, Timeout time.Duration
	// During limits when the check is tried.
	During During
}

// During is when a check is tried.
type During string

const (
	DuringAlways During = ""       // at the switch, and for as long as the release is live
	DuringDeploy During = "deploy" // at the switch alone: for what all nodes share, such as a database
)

// HTTPCheck passes on status 2xx, or only on Status if that is set, provided that Contains is in the first 64 KiB of
// the body.
type HTTPCheck struct {
	URL      string
	Status   int
	Contains string
}

// MaxManifest bounds a manifest, in bytes, before and after its variables are filled in.
const MaxManifest = 1 << 20
