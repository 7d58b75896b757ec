// Package kv is the contract of the store that holds kedge's shared state, and the layout of its keys. Package
// kv/consul keeps the contract in Consul, kv/dir in a watched directory; kv/open opens either by its URL.
//
// # Who writes what
//
// Each key has one writer, and kinds come first, so that Consul's ACLs can hold each party to its own. Keys are
// relative to the store's prefix, by default kedge/.
//
//	desired/STAGE/ROLE/UNIT             the mirror that holds the lease; a person, where no mirror runs
//	pins/STAGE/ROLE/UNIT[/NODE]         operators
//	control/STAGE/ROLE/UNIT             operators; the mirror deletes what it has done
//	status/STAGE/ROLE/NODE              that node's agent, held by its Presence
//	history/STAGE/ROLE/UNIT/GENERATION  the mirror
//	mirror/lease, mirror/state          the mirror that holds the lease
//	mirror/hook                         any other mirror, to which a webhook came
//
// A part of a key is 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit. A value is what its
// writer put, byte for byte; readers pass over the newlines and byte order marks of people.
//
// # What a reader may believe
//
// Absence is the dangerous answer. Consul answers 404 to a token that may not read, and a server that is alone or
// behind can answer with less than there is. So a key counts as absent only where its folder key (pins/prod/web/,
// with an empty value, see EnsureFolders) is in the same answer; whatever looks like a step back is confirmed by
// the leader first; and a View keeps what was known, and says in Err what is wrong, for as long as there is
// trouble. Watch never gives up: it backs off with jitter and goes on.
//
// # What a writer may believe
//
// A Commit happens whole or not at all. ErrConflict, ErrDenied, ErrLeaseLost and ErrTooLarge mean that it didn't;
// ErrUnavailable that nobody knows, so read again. A Commit under a Lease is checked against it where it is
// applied, so a holder that lost it without knowing writes nothing. Lease.Context is there to save it the work.
package kv

import (
	"context"
	"errors"
	"time"
)

// Sentinels that callers branch on; errors of this package wrap them.
var (
	ErrNotFound    = errors.New("no such key")
	ErrConflict    = errors.New("the key was changed meanwhile")
	ErrDenied      = errors.New("permission denied")
	ErrNoFolder    = errors.New("no such folder")    // an ErrDenied that may as well be a store without anything in it
	ErrEmpty       = errors.New("nothing there yet") // an ErrNoFolder, by a token that may read the folder: for people
	ErrUnavailable = errors.New("the store is unavailable")
	ErrLeaseLost   = errors.New("the lease is lost")
	ErrTooLarge    = errors.New("the value or transaction is too large")
)

// ConfigError is an error of a configuration that names no store: whoever typed it has to change it.
type ConfigError struct{ Err error }

func (e ConfigError) Error() string { return e.Err.Error() }
func (e ConfigError) Unwrap() error { return e.Err }

// Entry is one key of the store.
type Entry struct {
	// Key is relative to the store's prefix: desired/prod/web/app.
	Key   string
	Value []byte
	// Version changes with every write that changes this key, and is never 0. It is only good for Op.Version;
	// versions of two keys, or of before and after a restore, don't compare.
	Version uint64
	// Session holds the entry while its writer lives; empty: nobody does. See Presence.
	Session string
}

// View is what a watch knows of a prefix.
type View struct {
	// Entries are sorted by key, folder keys left out. They are what was last known for certain: trouble, a stale
	// answer or a lost permission never shrinks them.
	Entries []Entry
	// Folders are the folder keys below the prefix that were last seen, sorted. Nil: the store has none that could be
	// lost.
	Folders []string
	// Synced is false until the prefix was read once for certain. Only then does a missing key mean absence.
	Synced bool
	// Err is why the view may be out of date, and nil again once it isn't: ErrDenied, ErrUnavailable.
	Err error
	// Since is when Err last changed between nil and not nil.
	Since time.Time
}

// Op is one operation of a Commit. Make it with Put, Create, Replace, Delete, DeleteIf or Check.
type Op struct {
	Kind    OpKind
	Key     string
	Value   []byte
	Version uint64
}

// OpKind says what an Op does.
type OpKind int

const (
	OpPut      OpKind = iota // write, whatever is there
	OpCreate                 // write, if the key is absent
	OpReplace                // write, if the key has Version
	OpDelete                 // delete, if it is there
	OpDeleteIf               // delete, if the key has Version
)

func Put(key string, value []byte) Op    { return Op{Kind: OpPut, Key: key, Value: value} }
func Create(key string, value []byte) Op { return Op{Kind: OpCreate, Key: key, Value: value} }
func Replace(key string, value []byte, version uint64) Op {
	return Op{Kind: OpReplace, Key: key, Value: value, Version: version}
}
func Delete(key string) Op                   { return Op{Kind: OpDelete, Key: key} }
func DeleteIf(key string, version uint64) Op { return Op{Kind: OpDeleteIf, Key: key, Version: version} }

// Store is the contract that Consul and the watched directory both keep; the conformance suite is its text in
// tests. Methods may be called from many goroutines.
type Store interface {
	// Get reads one key from the leader. ErrNotFound means that it is absent for certain only where the token may
	// read it: Consul answers a token without rights the same way, so callers that act on absence use Watch or List.
	Get(ctx context.Context, key string) (Entry, error)

	// List reads every key below prefix, which ends in "/" or is empty, from the leader, sorted, folder keys left
	// out. An empty result without the prefix's folder key in it is ErrDenied: see EnsureFolders. It is ErrEmpty as
	// well if the token may read that key.
	List(ctx context.Context, prefix string) ([]Entry, error)

	// Watch calls f, one call at a time, with a first view as soon as there is one (a failing store's first view
	// has Err and isn't Synced), and then after every change of entries or Err, until ctx ends; it returns
	// ctx's error, or at once an error for a prefix that no store could watch. Changes that come together may be
	// seen as one: it tells state, not events.
	Watch(ctx context.Context, prefix string, f func(View)) error

	// Commit applies all of ops or none. A failed condition is ErrConflict, a missing permission ErrDenied. With a
	// lease, nothing is applied unless the lease is held at that moment, else ErrLeaseLost, whatever its holder
	// believes. At most MaxOps by their Cost, each key once, and some 370 KiB of values, else ErrTooLarge. Writing the
	// value that is there already wakes nobody. After ErrUnavailable the outcome is unknown: read again.
	Commit(ctx context.Context, lease Lease, ops ...Op) error

	// Lease waits until it holds the lease at key, then returns it. holder is shown to people (in the key's value, as
	// JSON with field "holder"). ttl is at least 10 s on Consul, which takes up to 2 ttl, and 1 s of lock-delay,
	// to give a dead holder's lease to another. It waits as long as the store is unavailable, but a missing permission
	// is ErrDenied at once. A holder keeps the lease when ctx ends later.
	Lease(ctx context.Context, key, holder string, ttl time.Duration) (Lease, error)

	// Presence ties entries to the life of this process's node, under name. It doesn't wait for the store.
	Presence(ctx context.Context, name string) (Presence, error)

	// EnsureFolders creates the folder keys of prefixes where they are missing. The mirror, which may write
	// everywhere, does so at its start; agents need them to tell absence from a lost permission, and Consul needs
	// one in every watched prefix, or its watchers wake on every write anywhere.
	EnsureFolders(ctx context.Context, prefixes ...string) error

	// String names the store for people: consul at http://127.0.0.1:8500, prefix kedge/.
	String() string

	// Close ends what the store keeps open. Leases and presences are closed by their owners, before.
	Close() error
}

// MaxOps bounds the Cost of a Commit's operations, its fence left out; some Consul servers take 64 operations a
// transaction.
const MaxOps = 60

// Cost is what an operation counts towards MaxOps: Consul needs two for a DeleteIf.
func (o Op) Cost() int {
	if o.Kind == OpDeleteIf {
		return 2
	}
	return 1
}

// Lease is held by one process at a time.
type Lease interface {
	// Context ends when the lease is lost, with cause ErrLeaseLost, or released. It ends by the clock, at the
	// latest when a renewal is a ttl overdue, so that a holder that was asleep stops before it acts.
	Context() context.Context
	// Release gives the lease to the next, at once.
	Release(ctx context.Context) error
}

// LeaseHolder is what the key of a lease holds, as JSON.
type LeaseHolder struct {
	Holder string `json:"holder"`
}

// Presence writes entries that say whether their writer lives: their Session is set while it does.
type Presence interface {
	// Joined waits until the store knows the presence, and returns since when, as a number that grows from each
	// time to the next: from a process to the one after it on the same node, and when what it holds was lost in between,
	// as to a node that was cut off, or put back to what it was earlier, as by the restore of a snapshot. It compares
	// with the numbers of other presences of the same store: the larger joined later. changed is closed once the number
	// is another.
	Joined(ctx context.Context) (since uint64, changed <-chan struct{}, err error)
	// Leave lets Close leave key as it is, held by nobody, as if its writer had died: for one that comes back soon.
	Leave(key string)
	// Put writes key and holds it, also if an earlier process held it. When its session or entry is lost later, as to
	// a node that was thought dead or a restored snapshot, both come back by themselves.
	Put(ctx context.Context, key string, value []byte) error
	// Close deletes what it holds: a node that leaves in good order is not a dead one.
	Close(ctx context.Context) error
}
