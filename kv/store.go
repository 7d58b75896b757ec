// Package kv is the contract of the store that holds kedge's shared state, and the layout of its keys. Package
// kv/consul implements the contract by Consul, kv/dir by a watched directory; kv/open opens either by its URL.
//
// # Who writes what
//
// The kind of a key comes first, so that Consul's ACLs can bound each party to the keys that it writes. Keys are
// relative to the store's prefix, by default kedge/.
//
//	desired/STAGE/ROLE/UNIT             the mirror that holds the lease; a person or the bridge, where no mirror runs
//	pins/STAGE/ROLE/UNIT[/NODE]         operators; the bridge, where a mirror runs
//	control/STAGE/ROLE/UNIT             operators; the mirror deletes what it has done
//	status/STAGE/ROLE/NODE              that node's agent, held by its Presence; the mirror deletes those of dead nodes
//	history/STAGE/ROLE/UNIT/GENERATION  the mirror
//	mirror/lease, mirror/state          the mirror that holds the lease
//	mirror/notified/RECEIVER            the mirror: which events a receiver has had
//	mirror/hook                         a mirror without the lease, to which a webhook came
//
// A part of a key is 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit. It can't end as
// editors' temporary files do. A value is what its writer put, byte for byte; readers ignore the newlines and
// byte-order marks that people's tools add.
//
// # What a reader may rely on
//
// Absence is the dangerous answer. Consul lists nothing to a token that may not read, and a server that is isolated or
// behind can answer with less than there is. So a Watch takes a key for absent only if the answer has the folder key of
// the watched prefix, and Consul left nothing out of it. The folder key of pins/prod/web/ is that prefix itself, with
// an empty value: see EnsureFolders. Whatever looks like a step back is first confirmed by the leader. The watched
// directory needs neither folder keys nor a leader. During an error a View keeps what was last known, and Err says what
// is wrong.
// Watch never gives up: it tries again, with Consul after a backoff with jitter.
//
// # What a writer may rely on
//
// A Commit happens whole or not at all. ErrConflict, ErrDenied, ErrLeaseLost and ErrTooLarge mean that it didn't
// happen; after ErrUnavailable, or if its context ended, the outcome is unknown, so read again. The store applies a
// Commit under a Lease only if the lease is held at that moment. So a holder that lost its lease without noticing
// writes nothing. Lease.Context only spares such a holder useless work.
package kv

import (
	"context"
	"errors"
	"strings"
	"time"
)

// The errors that callers branch on. A Store's errors wrap them, except for an invalid argument or an ended context.
var (
	ErrNotFound = errors.New("no such key")
	ErrConflict = errors.New("the key was changed meanwhile")
	ErrDenied   = errors.New("permission denied")
	ErrNoFolder = errors.New("no such folder") // an ErrDenied: no right to read the folder key, or no mirror has made it
	// ErrEmpty is an ErrNoFolder, too: the token may read the folder key, which doesn't exist. It makes messages exact.
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
	// Version changes with every write of another value, and is never 0. It is for Op.Version, and
	// for noticing changes. Versions of two keys can't be compared, nor versions from before and
	// after a restore.
	Version uint64
	// Session is the live session that holds the entry for its writer; empty: none. See Presence and Lease.
	Session string
}

// View is what a watch currently knows of a prefix.
type View struct {
	// Entries are sorted by key, without folder keys. They are the last certain state, with what
	// later answers added or changed. An error, a stale answer or a lost permission never removes
	// any.
	Entries []Entry
	// Folders are the folder keys below the prefix that were last seen, sorted. Nil: none are needed, or no answer yet.
	Folders []string
	// Synced is set once the prefix was read with certainty. Before that, a missing key does not mean absence.
	Synced bool
	// Err is why the view may be out of date, ErrDenied or ErrUnavailable; nil: it is up to date. An ErrDenied that is
	// ErrNoFolder, too, means that the answer lacks the folder key. An ErrUnavailable that is ErrTooLarge, too, means
	// that there is more below the prefix than MaxListBytes.
	Err error
	// Since is when Err last changed from nil to an error or back; before that, when the first view
	// was made.
	Since time.Time
}

// Op is one operation of a Commit. Make it with Put, Create, Replace, Delete or DeleteIf.
type Op struct {
	Kind    OpKind
	Key     string
	Value   []byte
	Version uint64
}

// OpKind is what an Op does, and on which condition. If the condition fails, Commit returns ErrConflict.
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
	// Get reads one key, with Consul from the leader. A missing key is ErrNotFound, one that the token may not read
	// ErrDenied. Servers before Consul 1.4 answer both with ErrNotFound: where absence is dangerous, use Watch or List.
	Get(ctx context.Context, key string) (Entry, error)

	// List reads every key below prefix, with Consul from the leader, sorted, without folder keys. prefix ends in "/"
	// or is empty. With Consul, the error is ErrDenied if the token may not read all of these keys, or if there is
	// neither an entry nor prefix's folder key. If the folder key is missing, that error is ErrNoFolder, too. It is also
	// ErrEmpty if nothing was left out, and the token may read the folder key. More than MaxListBytes is ErrUnavailable
	// and ErrTooLarge.
	List(ctx context.Context, prefix string) ([]Entry, error)

	// Watch calls f with a first view as soon as there is one. Until ctx ends, it calls f again after every change of
	// entries, folders or the kind of Err. One call ends before the next begins. If the first reads fail, the first
	// view has Err and isn't Synced. Changes that come together may be seen as one: Watch tells state, not events. It
	// returns ctx's error or, if prefix is invalid, an error at once.
	Watch(ctx context.Context, prefix string, f func(View)) error

	// Commit applies all of ops or none. A failed condition is ErrConflict, a missing permission ErrDenied. lease is nil
	// or a lease of this store. If that lease isn't held when the ops are to be applied, the error is ErrLeaseLost. More
	// than MaxOps by their Cost, or more than some 370 KiB of values, are ErrTooLarge; each key may occur once. Writing
	// the value that is there already wakes no watch. After ErrUnavailable, or if ctx ended, the outcome is unknown: read
	// again.
	Commit(ctx context.Context, lease Lease, ops ...Op) error

	// Lease waits until it holds the lease at key. holder is shown to people, as the field "holder" of the key's JSON
	// value. Consul takes a ttl of 10 s to 24 h; a directory takes any positive ttl, and ignores it. Without a heartbeat
	// Consul may take twice the ttl to give a dead holder's lease to another. Lease waits as long as the store is
	// unavailable, but another error, such as ErrDenied, ends the wait at once. A lease stays held when ctx ends later.
	Lease(ctx context.Context, key, holder string, ttl time.Duration) (Lease, error)

	// Presence returns a Presence, which ties entries to the life of this process on the named node, until it is closed.
	// It doesn't wait for the store; an empty name is an error.
	Presence(ctx context.Context, name string) (Presence, error)

	// EnsureFolders creates the missing folder keys of prefixes. The mirror, which may write everywhere, calls it at its
	// start and when a folder key is missing. Agents and operators call it as far as their tokens allow. Agents need
	// folder keys to tell absence from a lost permission. Consul needs a key in every watched prefix, as a watch that
	// sees no key wakes on every write anywhere.
	EnsureFolders(ctx context.Context, prefixes ...string) error

	// String describes the store for people: consul at http://127.0.0.1:8500, prefix kedge/.
	String() string

	// Close releases the store's resources. Callers must release their leases, and close their presences, before that.
	Close() error
}

// MaxList bounds what is read of one prefix, in bytes of memory. MaxRoleList bounds what is read of the records or the
// pins of one role, as every agent does. Without bounds, whoever may write keys could exhaust the memory of the
// processes that list them. The reports of 10,000 nodes of 10 units take some 40 MiB, 50,000 pins of nodes some 30 MiB.
const (
	MaxList     = 128 << 20
	MaxRoleList = 32 << 20
)

// MaxListBytes returns the bound of the entries below a prefix, as the sum of their Size, in bytes. It is MaxRoleList
// for a prefix within DesiredPrefix or PinsPrefix, such as a role's, and MaxList for any other prefix.
func MaxListBytes(prefix string) int {
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

// MaxOps bounds the sum of Cost over a Commit's operations, without the fencing check: some Consul servers take 64.
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
	// answer: at the latest one ttl after the last successful renewal was sent. If the process was suspended longer, it
	// ends soon after the process goes on; a Commit fails at once.
	Context() context.Context
	// Release frees the lease for the next holder, at once. If the lease is lost already, that is no error.
	Release(ctx context.Context) error
}

// LeaseHolder is the JSON value of a lease's key.
type LeaseHolder struct {
	Holder string `json:"holder"`
}

// Presence writes entries that show whether their writer lives: they have a Session as long as it
// lives. With Consul they keep the Session for up to a minute longer. Without a heartbeat, as when
// the token may register no service, they keep it until the node is gone, unless the session has a
// TTL.
type Presence interface {
	// Join writes and holds an entry, as Put does. since is a number that grows with each Join to any entry of the
	// store. With Consul the number stays the same if the presence holds that value already. A list that shows
	// an entry also shows all entries of lower numbers that still exist. lost is closed once the session of the entries
	// was lost, or a restored snapshot changed them. The numbers are void then, and each entry has to join again. An
	// entry that is deleted, or taken by another process, doesn't close lost.
	Join(ctx context.Context, key string, value []byte) (since uint64, lost <-chan struct{}, err error)
	// KeepAtClose makes Close leave key in place, held by nobody, as if its writer had died. It is
	// for a process that comes back soon. Until another Put or Join of key, the presence doesn't
	// restore it any more.
	KeepAtClose(key string)
	// Put writes key and holds it, even if an earlier process held it. If its session or entry is lost later, as when the
	// node was thought dead or a snapshot was restored, the presence restores both. An entry that another process has
	// taken stays with that process; with Consul, it is restored after that process ended.
	Put(ctx context.Context, key string, value []byte) error
	// Close deletes the entries that the presence holds, except those of KeepAtClose. So a node
	// that leaves in good order doesn't look dead.
	Close(ctx context.Context) error
}
