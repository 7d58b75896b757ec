package consul_test

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// Consul counts connections per client address, and answers 429 to those that are too many. They wait their turn.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Config: `limits { http_max_conns_per_client = 12 }`})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	var all []*kvtest.Views
	for range 16 {
		all = append(all, kvtest.Watch(t, c.Open(""), "pins/prod/web/"))
	}
	refused := func() (n int) {
		for _, w := range all {
			if views := w.All(); len(views) > 0 && errors.Is(views[len(views)-1].Err, kv.ErrUnavailable) {
				n++
			}
		}
		return n
	}
	kvtest.Await(t, "a refusal", func() error {
		if refused() == 0 {
			return errors.New("nobody was refused")
		}
		return nil
	})
	c.Servers[0].SetConfig(`limits { http_max_conns_per_client = 100 }`)
	c.Servers[0].Reload()
	for _, w := range all {
		w.Await(t, "its turn", kvtest.Healthy("app=v1"))
	}
}

// Consul's own limits of rates: 429 to reads and 503 to writes, where the server can't tell whether to try again.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Persistent: true})
	folders(t, c, "d/")
	c.Servers[0].Stop()
	c.Servers[0].SetConfig(`limits { request_limits { mode = "enforcing" read_rate = 5 write_rate = 5 } }`)
	c.Servers[0].Start()
	kvtest.Await(t, "the server", func() error { _, err := c.Client().Status().Leader(); return err })
	s := c.Open("")
	views := kvtest.Watch(t, s, "d/")
	views.Await(t, "the start", kvtest.Healthy(""))
	var reads, writes error
	kvtest.Await(t, "refusals", func() error {
		var mu sync.Mutex
		var rush sync.WaitGroup
		for range 30 { // at once: one after the other, a busy machine may stay within the limit
			rush.Go(func() {
				_, read := s.List(t.Context(), "d/")
				written := s.Commit(t.Context(), nil, kv.Put("d/k", []byte("v")))
				mu.Lock()
				defer mu.Unlock()
				reads, writes = cmp.Or(reads, read), cmp.Or(writes, written)
			})
		}
		rush.Wait()
		if reads == nil || writes == nil {
			return errors.New("no limit was met")
		}
		return nil
	})
	if !errors.Is(reads, kv.ErrUnavailable) || !errors.Is(writes, kv.ErrUnavailable) {
		t.Fatalf("reads are refused with %v, writes with %v", reads, writes)
	}
	views.Await(t, "the value, when the rush is over", kvtest.Healthy("k=v"))
}

// The zero configuration is Consul's own environment. Not parallel: the environment is the process's.
func TestEnvironment(t *testing.T) {
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "pins/prod/web/")
	token := c.Token(readWeb)
	t.Setenv("CONSUL_HTTP_ADDR", "http://"+c.Addr())
	t.Setenv("CONSUL_HTTP_TOKEN", token)
	s := open(t, consul.Config{})
	if _, err := s.List(t.Context(), "pins/prod/web/"); err != nil {
		t.Errorf("with CONSUL_HTTP_TOKEN: %v", err)
	}
	if want := "consul at http://" + c.Addr() + ", prefix kedge/"; s.String() != want {
		t.Errorf("the store calls itself %q, want %q", s.String(), want)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CONSUL_HTTP_TOKEN", "")
	t.Setenv("CONSUL_HTTP_TOKEN_FILE", file)
	if _, err := open(t, consul.Config{}).List(t.Context(), "pins/prod/web/"); err != nil {
		t.Errorf("with CONSUL_HTTP_TOKEN_FILE: %v", err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := consul.Open(consul.Config{}); err == nil {
		t.Error("open took an empty CONSUL_HTTP_TOKEN_FILE")
	}
}

// The rights that the design gives to each party are enough, and end where they should.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	mirror := c.Open(c.Token(`key_prefix "kedge/" { policy = "write" } session "server-1" { policy = "write" }`))
	agent := c.Open(c.Token(`
		key_prefix "kedge/desired/" { policy = "read" }
		key_prefix "kedge/pins/" { policy = "read" }
		key_prefix "kedge/status/" { policy = "write" }
		session "server-1" { policy = "write" }
		node "server-1" { policy = "read" }`))
	operator := c.Open(c.Token(`
		key_prefix "kedge/" { policy = "read" }
		key_prefix "kedge/pins/" { policy = "write" }
		key_prefix "kedge/control/" { policy = "write" }`))
	ctx := t.Context()
	lease, err := mirror.Lease(ctx, kv.MirrorLease, "mirror-1", 10e9)
	if err != nil {
		t.Fatal(err)
	}
	must := func(who string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
	denied := func(who string, err error) {
		t.Helper()
		if !errors.Is(err, kv.ErrDenied) {
			t.Errorf("%s: %v", who, err)
		}
	}
	must("the mirror makes the folders", mirror.EnsureFolders(ctx, "desired/prod/web/", "pins/prod/web/", "status/prod/web/", "control/prod/web/"))
	must("the mirror writes a record", mirror.Commit(ctx, lease, kv.Put("desired/prod/web/app", []byte("r"))))
	must("an operator pins", operator.Commit(ctx, nil, kv.Put("pins/prod/web/app", []byte("p"))))
	kvtest.Watch(t, agent, "desired/prod/web/").Await(t, "the record", kvtest.Healthy("app=r"))
	kvtest.Watch(t, agent, "pins/prod/web/").Await(t, "the pin", kvtest.Healthy("app=p"))
	p := kvtest.Present(t, agent, "server-1")
	kvtest.Watch(t, mirror, "status/prod/web/").Await(t, "the report", kvtest.Held("server-1=ready"))

	denied("an agent writes a record", agent.Commit(ctx, nil, kv.Put("desired/prod/web/app", []byte("x"))))
	denied("an agent pins", agent.Commit(ctx, nil, kv.Put("pins/prod/web/app", []byte("x"))))
	denied("an operator writes a record", operator.Commit(ctx, nil, kv.Put("desired/prod/web/app", []byte("x"))))
	_, err = agent.Lease(ctx, kv.MirrorLease, "agent", 10e9)
	denied("an agent takes the lease", err)
	must("the agent leaves", p.Close(ctx))
	must("the mirror leaves", lease.Release(ctx))
}

// A token that may not read a single key gets an error that says so, not one of a folder that isn't there.
func TestOneKeyIsDenied(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	put(t, c, "pins/prod/web/secret", "v1")
	s := c.Open(c.Token(readWeb + ` key "kedge/pins/prod/web/secret" { policy = "deny" }`))
	saysSo := func(err error) bool {
		return errors.Is(err, kv.ErrDenied) && !errors.Is(err, kv.ErrNoFolder) && !errors.Is(err, kv.ErrEmpty) &&
			strings.Contains(err.Error(), "Consul left out keys below kedge/pins/prod/web/")
	}
	if _, err := s.List(t.Context(), "pins/prod/web/"); !saysSo(err) {
		t.Errorf("a list: %v", err)
	}
	kvtest.Watch(t, s, "pins/prod/web/").Await(t, "the same error", func(v kv.View) bool { return saysSo(v.Err) })
}
