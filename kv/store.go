// Package kv is the contract of the store that holds kedge's shared state, and the layout of its keys. Package
// kv/consul implements the contract by Consul, kv/dir by a watched directory; kv/open opens either by its URL.
//
// # Who writes what
//
// Each key has one writer, and kinds come first, so that Consul's ACLs can bound each party to its own keys. Keys
// are relative to the store's prefix, by default kedge/.
//
//	desired/STAGE/ROLE/UNIT             the mirror that holds the lease; a person, where no mirror runs
//	pins/STAGE/ROLE/UNIT[/NODE]         operators
//	control/STAGE/ROLE/UNIT             operators; the mirror deletes what it has done
//	status/STAGE/ROLE/NODE              that node's agent, held by its Presence
//	history/STAGE/ROLE/UNIT/GENERATION  the mirror
//	mirror/lease, mirror/state          the mirror that holds the lease
//	mirror/hook                         any other mirror, to which a webhook came
//
// A part of a key is 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit. A value is what
// its writer put, byte for byte; readers ignore the newlines and byte-order marks that people's tools add.
//
// # What a reader may rely on
//
// Absence is the dangerous answer. Consul answers 404 to a token that may not read, and a server that is isolated
// or behind can answer with less than there is. So a key counts as absent only if its folder key (pins/prod/web/,
// with an empty value, see EnsureFolders) is in the same answer. Whatever looks like a step back is first
// confirmed by the leader. During an error a View keeps what was last known, and Err says what is wrong. Watch
// never gives up: it backs off with jitter and tries again.
//
// # What a writer may rely on
//
// A Commit happens whole or not at all. ErrConflict, ErrDenied, ErrLeaseLost and ErrTooLarge mean that it didn't
// happen; after ErrUnavailable the outcome is unknown, so read again. A Commit under a Lease is checked against it
// where it is applied, so a holder that lost it unnoticed writes nothing. Lease.Context only saves it the work.
package kv

import (
	"context"
	"errors"
	"strings"
	"time"
)

// The errors that callers branch on. Errors of this package wrap them.
var (
	ErrNotFound = errors.New("no such key")
	ErrConflict = errors.New("the key was changed meanwhile")
	ErrDenied   = errors.New("permission denied")
	ErrNoFolder = errors.New("no such folder") // an ErrDenied: no right to read the folder key, or no mirror has made it
	// ErrEmpty is an ErrNoFolder for a folder that the token may read. It makes messages more exact.
	ErrEmpty       = errors.New("the folder holds no key yet")
	ErrUnavailable = errors.New("the store is unavailable")
	ErrLeaseLost   = errors.New("the lease is lost")
	ErrTooLarge    = errors.New("the value or transaction is too large")
)

// ConfigError means that the configuration names no usable store: a person has to change it.
type ConfigError struct{ Err error }

func (e ConfigError) Error() string { return e.Err.Error() }
func (e ConfigError) Unwrap() error { return e.Err }

// Entry is one key of the store.
type Entry struct {
	// Key is relative to the store's prefix: desired/prod/web/app.
	Key   string
	Value []byte
	// Version changes with every write of this key, and is never 0. Use it only for Op.Version: versions of two
	// keys don't compare, nor those from before and after a restore.
	Version uint64
	// Session is the session that holds the entry as long as its writer lives; empty: none. See Presence.
	Session string
}

// View is what a watch currently knows of a prefix.
type View struct {
	// Entries are sorted by key, without folder keys. They are the last certain state: an error, a stale answer or
	// a lost permission never removes any.
	Entries []Entry
	// Folders are the folder keys below the prefix that were last seen, sorted. Nil: this store needs none.
	Folders []string
	// Synced is set once the prefix was read with certainty. Before that, a missing key does not mean absence.
	Synced bool
	// Err is why the view may be out of date, ErrDenied or ErrUnavailable; nil: it is up to date. It is ErrTooLarge,
	// too, as long as there is more below the prefix than MostListed.
	Err error
	// Since is when Err last became nil or not nil.
	Since time.Time
}

// Op is one operation of a Commit. Make it with Put, Create, Replace, Delete or DeleteIf.
type Op struct {
	Kind    OpKind
	Key     string
	Value   []byte
	Version uint64
}

// OpKind is the kind of an Op.
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

// Store is the contract that Consul and the watched directory both fulfil; the conformance suite tests it. Methods
// may be called from many goroutines.
type Store interface {
	// Get reads one key from the leader. Only a token that may read the key can take ErrNotFound for absence, as
	// Consul gives a token without rights the same answer. Callers that act on absence use Watch or List.
	Get(ctx context.Context, key string) (Entry, error)

	// List reads every key below prefix from the leader, sorted, without folder keys. prefix ends in "/" or is
	// empty. An empty result without the prefix's folder key is ErrDenied: see EnsureFolders. It is also ErrEmpty
	// if the token may read that key. More than MostListed is ErrUnavailable and ErrTooLarge.
	List(ctx context.Context, prefix string) ([]Entry, error)

	// Watch calls f with a first view as soon as there is one, and after every change of entries or Err, until ctx ends.
	// One call ends before the next begins. If the store fails, the first view has Err and isn't Synced. Changes that come
	// together may be seen as one: Watch tells state, not events. It returns ctx's error, or an error at once if no store
	// could watch the prefix.
	Watch(ctx context.Context, prefix string, f func(View)) error

	// Commit applies all of ops or none. A failed condition is ErrConflict, a missing permission ErrDenied. With a
	// lease, nothing is applied unless the lease is held at that moment; otherwise the error is ErrLeaseLost. More
	// than MaxOps by their Cost, or more than some 370 KiB of values, are ErrTooLarge; each key may occur once.
	// Writing the value that is there already wakes no watch. After ErrUnavailable the outcome is unknown: read
	// again.
	Commit(ctx context.Context, lease Lease, ops ...Op) error

	// Lease waits until it holds the lease at key. holder is shown to people, as the field "holder" of the key's JSON
	// value. Consul takes a ttl of 10 s to 24 h, and may take twice the ttl to give a dead holder's lease to another.
	// Lease waits as long as the store is unavailable, but a missing permission is ErrDenied at once. A lease stays held
	// when ctx ends later.
	Lease(ctx context.Context, key, holder string, ttl time.Duration) (Lease, error)

	// Presence returns a Presence, which ties entries to the life of this process on the named node. It doesn't
	// wait for the store.
	Presence(ctx context.Context, name string) (Presence, error)

	// EnsureFolders creates the missing folder keys of prefixes. The mirror, which may write everywhere, calls it
	// at its start. Agents need folder keys to tell absence from a lost permission. Consul needs one in every
	// watched prefix, as otherwise a watch wakes on every write anywhere.
	EnsureFolders(ctx context.Context, prefixes ...string) error

	// String describes the store for people: consul at http://127.0.0.1:8500, prefix kedge/.
	String() string

	// Close releases the store's resources. Owners of leases and presences close those first.
	Close() error
}

// MaxList bounds what is read of one prefix, in bytes of memory. MaxRoleList bounds what is read of the records or the
// pins of one role, as every agent does. Without bounds, whoever may write keys could exhaust the memory of the
// processes that list them. The reports of 10,000 nodes of 10 units take some 40 MiB, 50,000 pins of nodes some 30 MiB.
const (
	MaxList     = 128 << 20
	MaxRoleList = 32 << 20
)

// MostListed returns the bound of the entries below a prefix, as the sum of their Size.
func MostListed(prefix string) int {
	for _, kind := range []string{DesiredPrefix, PinsPrefix} {
		if strings.HasPrefix(prefix, kind) && prefix != kind {
			return MaxRoleList
		}
	}
	return MaxList
}

// Size returns an estimate of an entry's memory, in bytes. For a pin that includes 256 bytes for what a mirror makes of
// the pin, however short its value is.
func (e Entry) Size() int {
	size := 128 + len(e.Key) + len(e.Value) + len(e.Session)
	if strings.HasPrefix(e.Key, PinsPrefix) {
		size += 256
	}
	return size
}

// MaxOps bounds the sum of Cost over a Commit's operations, without the fencing check: some Consul servers take 64
// operations in a transaction.
const MaxOps = 60

// Cost returns how much an operation counts towards MaxOps: Consul needs two operations for a DeleteIf.
func (o Op) Cost() int {
	if o.Kind == OpDeleteIf {
		return 2
	}
	return 1
}

// Lease is held by one process at a time.
type Lease interface {
	// Context ends when the lease is lost, with cause ErrLeaseLost, or released. With Consul it ends even without an
	// answer: at the latest one ttl after the last successful renewal was sent. So a process that was suspended stops
	// before it acts.
	Context() context.Context
	// Release frees the lease for the next holder, at once.
	Release(ctx context.Context) error
}

// LeaseHolder is the JSON value of a lease's key.
type LeaseHolder struct {
	Holder string `json:"holder"`
}

// Presence writes entries that show whether their writer lives: their Session is set as long as it does.
type Presence interface {
	// Join is Put, and returns in since a number that grows with each Join to any entry of the store. A list that shows
	// the entry with the higher number shows the other, too. lost is closed once entries that the presence holds were lost
	// or replaced, as when the node was cut off or a snapshot was restored. The numbers are void then, and each entry has
	// to join again.
	Join(ctx context.Context, key string, value []byte) (since uint64, lost <-chan struct{}, err error)
	// KeepAtClose makes Close leave key in place, held by nobody, as if its writer had died: for a process that comes
	// back soon.
	KeepAtClose(key string)
	// Put writes key and holds it, even if an earlier process held it. If its session or entry is lost later, as
	// when the node was thought dead or a snapshot was restored, the presence restores both.
	Put(ctx context.Context, key string, value []byte) error
	// Close deletes the entries that it holds: a node that leaves in good order is not a dead one.
	Close(ctx context.Context) error
}
