package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/kv"
	"kedge/kv/open"
)

// pointer returns an invented release.
func pointer(name string) deployments.Pointer {
	return deployments.Pointer{
		URL:    "s3://acme-releases/" + name + "/manifest.yaml",
		Digest: deployments.Digest(sha256.Sum256([]byte(name))),
	}
}

// unitFile returns a unit's file with only a release.
func unitFile(release string) string { return "release: " + pointer(release).String() + "\n" }

func unitID(tb testing.TB, s string) deployments.UnitID {
	tb.Helper()
	id, err := deployments.ParseUnitID(s)
	if err != nil {
		tb.Fatal(err)
	}
	return id
}

// dirStore opens a store in the test's own directory.
func dirStore(tb testing.TB) kv.Store {
	tb.Helper()
	return openStore(tb, "file://"+tb.TempDir())
}

func openStore(tb testing.TB, url string) kv.Store {
	tb.Helper()
	s, err := open.Store(open.Config{URL: url})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

// newPresence opens a presence that ends with the test: otherwise it would restore what the end of the test
// removes.
func newPresence(tb testing.TB, s kv.Store, node string) kv.Presence {
	tb.Helper()
	p, err := s.Presence(tb.Context(), node)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = p.Close(context.Background()) })
	return p
}

// recorder records every transaction that a store accepted.
type recorder struct {
	kv.Store
	mu      sync.Mutex
	commits [][]kv.Op
	fail    error               // what Commit answers instead, while set
	refuse  func([]kv.Op) error // why Commit is refused; nil: it isn't
}

func (r *recorder) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	r.mu.Lock()
	fail := r.fail
	if fail == nil && r.refuse != nil {
		fail = r.refuse(ops)
	}
	r.mu.Unlock()
	if fail != nil {
		return fail
	}
	err := r.Store.Commit(ctx, lease, ops...)
	if err == nil {
		if lease == nil && !(len(ops) == 1 && ops[0].Key == kv.MirrorHook) {
			return errors.New("the mirror wrote without a lease")
		}
		r.mu.Lock()
		r.commits = append(r.commits, ops)
		r.mu.Unlock()
	}
	return err
}

// taken returns the transactions since the last call.
func (r *recorder) taken() [][]kv.Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	commits := r.commits
	r.commits = nil
	return commits
}

func (r *recorder) setRefuse(refuse func([]kv.Op) error) {
	r.mu.Lock()
	r.refuse = refuse
	r.mu.Unlock()
}

func (r *recorder) setFail(err error) {
	r.mu.Lock()
	r.fail = err
	r.mu.Unlock()
}

// running is a mirror under test.
type running struct {
	*Mirror
	tb    testing.TB
	store kv.Store
	log   *logtest.Buffer
	stop  func()
}

// start runs a mirror, as tune changed it, until the test ends, or stop is called.
func start(tb testing.TB, c Config, tune ...func(*Mirror)) *running {
	tb.Helper()
	log := &logtest.Buffer{}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if c.Name == "" {
		c.Name = "mirror-1"
	}
	m, err := New(c)
	if err != nil {
		tb.Fatal(err)
	}
	m.rebuildWait = time.Second // the nodes of a test report at once
	for _, f := range tune {
		f(m)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	r := &running{Mirror: m, tb: tb, store: c.Store, log: log}
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			tb.Error("Run did not return")
		}
	})
	tb.Cleanup(func() {
		r.stop()
		if tb.Failed() {
			tb.Log(log.String())
		}
	})
	return r
}

// record waits until a unit's record satisfies ok, and returns it.
func (r *running) record(unit string, ok func(deployments.Record) bool) deployments.Record {
	r.tb.Helper()
	var last deployments.Record
	r.await("record of "+unit, func() error {
		e, err := r.store.Get(context.Background(), kv.DesiredPrefix+unit)
		if err != nil {
			return err
		}
		last, err = deployments.ParseRecord(e.Value)
		if err != nil {
			return err
		}
		if !ok(last) {
			return fmt.Errorf("it is %s", e.Value)
		}
		return nil
	})
	return last
}

// runs waits until a unit's target is release.
func (r *running) runs(unit, release string) deployments.Record {
	r.tb.Helper()
	return r.record(unit, func(rec deployments.Record) bool { return rec.Target == pointer(release) })
}

// status waits until mirror/state satisfies ok, and returns it.
func (r *running) status(ok func(deployments.MirrorState) bool) deployments.MirrorState {
	r.tb.Helper()
	var s deployments.MirrorState
	r.await("status", func() error {
		e, err := r.store.Get(context.Background(), kv.MirrorKey)
		if err != nil {
			return err
		}
		s = deployments.MirrorState{}
		if err := json.Unmarshal(e.Value, &s); err != nil {
			return err
		}
		if !ok(s) {
			return fmt.Errorf("it is %s", e.Value)
		}
		return nil
	})
	return s
}

// at waits until the mirror has taken a commit.
func (r *running) at(head string) deployments.MirrorState {
	r.tb.Helper()
	return r.status(func(s deployments.MirrorState) bool { return s.Head == head && s.Error == "" })
}

// refuses waits until the mirror has refused a commit, with an error that holds each of words.
func (r *running) refuses(head string, words ...string) deployments.MirrorState {
	r.tb.Helper()
	return r.status(func(s deployments.MirrorState) bool {
		for _, w := range words {
			if !strings.Contains(s.Error, w) {
				return false
			}
		}
		return s.Refused == head && s.Head != head
	})
}

func (r *running) await(what string, try func() error) {
	r.tb.Helper()
	await(r.tb, 30*time.Second, what, try)
}

func await(tb testing.TB, atMost time.Duration, what string, try func() error) {
	tb.Helper()
	end := time.Now().Add(atMost)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("%s: %v", what, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// desired reads all of desired/.
func desired(tb testing.TB, s kv.Store) map[string]string {
	tb.Helper()
	entries, err := s.List(context.Background(), kv.DesiredPrefix)
	if err != nil {
		tb.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		all[strings.TrimPrefix(e.Key, kv.DesiredPrefix)] = string(e.Value)
	}
	return all
}

func sameDesired(tb testing.TB, s kv.Store, want map[string]string) {
	tb.Helper()
	if got := desired(tb, s); !maps.Equal(got, want) {
		tb.Errorf("desired/ changed: %v, want %v", got, want)
	}
}
