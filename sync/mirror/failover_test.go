package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

// process is a mirror in its own process.
type process struct {
	*exec.Cmd
	name string
	log  *logtest.Buffer
}

// startProcess starts a mirror in its own process, which finds Consul by env.
func startProcess(t *testing.T, name, repo string, env []string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(os.Args[0]), name: name, log: &logtest.Buffer{}}
	p.Env = append(os.Environ(), env...)
	p.Env = append(p.Env, "KEDGE_TEST_AS=mirror", "KEDGE_TEST_REPO="+repo, "KEDGE_TEST_NAME="+name)
	p.Stdout, p.Stderr = p.log, p.log
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
		if t.Failed() {
			t.Logf("%s:\n%s", name, p.log)
		}
	})
	return p
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// pair is two mirrors in their own processes, with their own Consul and repository; a holds the lease.
type pair struct {
	*running // reads the store
	*gittest.Origin
	consul *kvtest.Consul
	a, b   *process
}

func startPair(t *testing.T) *pair {
	p := &pair{consul: kvtest.StartConsul(t, kvtest.ConsulOptions{}), Origin: gittest.New(t)}
	p.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	p.running = &running{tb: t, store: p.consul.Open(p.consul.RootToken), log: &logtest.Buffer{}}
	env := p.consul.Env(p.consul.RootToken)
	p.a = startProcess(t, "a", p.Bare, env)
	p.runs("prod/web/app", "app/1")
	p.b = startProcess(t, "b", p.Bare, env)
	return p
}

// The two cases share one test, as each waits for most of its time until Consul gives a dead lease away.
func TestDeadAndFrozenLeadersAreReplaced(t *testing.T) {
	t.Parallel()
	killed, frozen := startPair(t), startPair(t)
	killed.a.signal(t, syscall.SIGKILL)
	frozen.a.signal(t, syscall.SIGSTOP)
	began := time.Now()
	afterKill := killed.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	afterStop := frozen.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})

	killed.status(func(s deployments.MirrorState) bool { return s.Holder == "b" && s.Head == afterKill })
	t.Logf("the other mirror wrote %v after the leader's death", time.Since(began).Round(time.Millisecond))
	frozen.status(func(s deployments.MirrorState) bool { return s.Holder == "b" && s.Head == afterStop })
	for _, p := range []*pair{killed, frozen} {
		if got := p.runs("prod/web/app", "app/2"); got.Generation != 2 {
			t.Errorf("record %+v", got)
		}
	}

	// b holds a fresh lease, and sleeps; a wakes to a push that it has not seen, and to a lease that it lost long ago.
	frozen.b.signal(t, syscall.SIGSTOP)
	third := frozen.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	before, asleep := versions(t, frozen.consul), holder(t, frozen.consul)
	frozen.a.signal(t, syscall.SIGCONT)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		after := versions(t, frozen.consul)
		if holder(t, frozen.consul) != asleep {
			break // on a busy machine b may have slept for longer than its lease lasts: it is a's by now
		}
		if !maps.Equal(before, after) {
			t.Fatalf("a mirror without the lease wrote: before %v, after %v", before, after)
		}
	}
	frozen.b.signal(t, syscall.SIGCONT)
	frozen.status(func(s deployments.MirrorState) bool { return s.Head == third })
	if got := frozen.runs("prod/web/app", "app/3"); got.Generation != 3 {
		t.Errorf("record %+v", got)
	}
}

// holder returns the session that holds the lease.
func holder(t *testing.T, c *kvtest.Consul) string {
	t.Helper()
	pair, _, err := c.Client().KV().Get(kv.DefaultPrefix+kv.MirrorLease, nil)
	if err != nil || pair == nil {
		t.Fatal(pair, err)
	}
	return pair.Session
}

// versions returns the version of every key that a mirror may write, except the lease's own.
func versions(t *testing.T, c *kvtest.Consul) map[string]uint64 {
	t.Helper()
	pairs, _, err := c.Client().KV().List(kv.DefaultPrefix, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]uint64{}
	for _, p := range pairs {
		if p.Key != kv.DefaultPrefix+kv.MirrorLease {
			all[p.Key] = p.ModifyIndex
		}
	}
	return all
}

// A mirror that stops cleanly hands over at once.
func TestHandover(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	store := consul.Open(consul.RootToken)
	a := start(t, Config{Store: store, Repo: o.Bare, Name: "a"})
	a.runs("prod/web/app", "app/1")
	b := start(t, Config{Store: consul.Open(consul.RootToken), Repo: o.Bare, Name: "b"})
	a.stop()
	stopped := time.Now()
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	b.status(func(s deployments.MirrorState) bool { return s.Holder == "b" && s.Head == head })
	t.Logf("the other mirror wrote %v after the first had stopped", time.Since(stopped).Round(time.Millisecond))
}

// cut is a store whose user dies at its n-th transaction: before or after the transaction took effect.
type cut struct {
	kv.Store
	mu    sync.Mutex
	left  int
	after bool
}

func (c *cut) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < 0 {
		return kv.ErrLeaseLost
	}
	c.left--
	if c.left < 0 && !c.after {
		return kv.ErrLeaseLost
	}
	err := c.Store.Commit(ctx, lease, ops...)
	if c.left < 0 {
		return kv.ErrLeaseLost
	}
	return err
}

// Lease returns no second lease to a dead user.
func (c *cut) Lease(ctx context.Context, key, holder string, ttl time.Duration) (kv.Lease, error) {
	c.mu.Lock()
	dead := c.left < 0
	c.mu.Unlock()
	if dead {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return c.Store.Lease(ctx, key, holder, ttl)
}

func TestDeathBetweenTransactions(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	files := func(release string) map[string]string {
		all := map[string]string{}
		for i := range 70 {
			all["prod/web/u"+strconv.Itoa(i)+".yaml"] = unitFile(release)
		}
		return all
	}
	first := o.Commit(files("u/1"))
	second := o.Commit(files("u/2"))
	ends := 0
	for n := range 4 {
		for _, after := range []bool{false, true} {
			store := dirStore(t)
			o.Git(o.Work, "push", "-q", "-f", "origin", first+":refs/heads/main")
			m := start(t, Config{Store: store, Repo: o.Bare, Name: "before"})
			m.at(first)
			m.stop()
			o.Git(o.Work, "push", "-q", "origin", second+":refs/heads/main")
			dying := start(t, Config{Store: &cut{Store: store, left: n, after: after}, Repo: o.Bare, Name: "dying"})
			dying.await("death", func() error {
				c := dying.store.(*cut)
				c.mu.Lock()
				defer c.mu.Unlock()
				if c.left >= 0 && !done(t, store, second) {
					return errors.New("it lives")
				}
				return nil
			})
			dying.stop()
			if done(t, store, second) {
				ends++
			}
			next := start(t, Config{Store: store, Repo: o.Bare, Name: "next"})
			next.at(second)
			next.stop()
			for unit, value := range desired(t, store) {
				r, err := deployments.ParseRecord([]byte(value))
				if err != nil || r.Target != pointer("u/2") || r.Generation != 2 || r.Stable != pointer("u/1") {
					t.Errorf("killed at transaction %d, after it %v: %s is %s, %v", n, after, unit, value, err)
				}
			}
		}
	}
	if ends == 0 || ends == 8 {
		t.Errorf("%d of 8 deaths came after the end: the test needs some of both", ends)
	}
}

// done reports whether mirror/state names head.
func done(t *testing.T, s kv.Store, head string) bool {
	e, err := s.Get(t.Context(), kv.MirrorKey)
	var st deployments.MirrorState
	return err == nil && json.Unmarshal(e.Value, &st) == nil && st.Head == head
}

// BenchmarkPush measures the time from git push's return until the record is written, which may be negative.
func BenchmarkPush(b *testing.B) {
	for _, where := range []string{"directory", "consul"} {
		b.Run(where, func(b *testing.B) {
			var store kv.Store
			if where == "consul" {
				c := kvtest.StartConsul(b, kvtest.ConsulOptions{})
				store = c.Open(c.RootToken)
			} else {
				store = dirStore(b)
			}
			o := gittest.New(b)
			written := &timed{Store: store, at: make(chan time.Time, 10)}
			m := start(b, Config{Store: written, Repo: o.Bare})
			m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app")}))
			for len(written.at) > 0 {
				<-written.at
			}
			var took []time.Duration
			for i := 0; b.Loop(); i++ {
				o.Push(map[string]string{"prod/web/app.yaml": unitFile(fmt.Sprint("app/", i))})
				pushed := time.Now()
				took = append(took, (<-written.at).Sub(pushed))
			}
			report(b, took)
		})
	}
}

// timed records when each transaction has succeeded.
type timed struct {
	kv.Store
	at chan time.Time
}

func (s *timed) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	err := s.Store.Commit(ctx, lease, ops...)
	if err == nil {
		s.at <- time.Now()
	}
	return err
}

func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-median")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms-worst")
}
