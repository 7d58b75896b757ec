package consul_test

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"

	"kedge/kv"
	"kedge/kv/kvtest"
)

// A leader that was just elected answers default reads while it still replays its log. Nobody may take that for the
// truth: neither who watched before nor who boots meanwhile, neither a list nor a get.
func TestReplaysItsLog(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a Consul server, and writes 100 MB to it")
	}
	t.Parallel()
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d servers", servers), func(t *testing.T) { replay(t, servers) })
	}
}

func replay(t *testing.T, servers int) {
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: servers, Persistent: true})
	folders(t, c, "desired/prod/web/")
	const generations, between, watchers = 10, 1200, 16
	filler := []byte(strings.Repeat("x", 8<<10))
	put(t, c, "desired/prod/web/removed", "pin")
	for g := range generations {
		put(t, c, "desired/prod/web/app", strconv.Itoa(g))
		var writers errgroup.Group
		writers.SetLimit(32)
		for i := range between {
			writers.Go(func() error {
				_, err := c.Client().KV().Put(&api.KVPair{Key: fmt.Sprintf("other/%d", i%64), Value: filler}, nil)
				return err
			})
		}
		if err := writers.Wait(); err != nil {
			t.Fatal(err)
		}
		if g == 0 {
			if _, err := c.Client().KV().Delete(kv.DefaultPrefix+"desired/prod/web/removed", nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := "app=" + strconv.Itoa(generations-1)
	old := func(v kv.View) bool { return len(v.Entries) > 0 && kvtest.Values(v) != want }

	var stores []kv.Store
	for i := range watchers {
		stores = append(stores, c.Servers[i%servers].Open(""))
	}
	var views []*kvtest.Views
	for _, s := range stores {
		views = append(views, kvtest.Watch(t, s, "desired/prod/web/"))
	}
	for _, v := range views {
		v.Await(t, "the newest record", kvtest.Healthy(want))
	}
	for _, n := range c.Servers {
		n.Kill()
	}
	for i := range watchers { // those that boot during the outage
		views = append(views, kvtest.Watch(t, c.Servers[i%servers].Open(""), "desired/prod/web/"))
	}
	started := time.Now()
	for _, n := range c.Servers {
		n.Start()
	}
	var askers sync.WaitGroup
	for _, s := range stores { // and those that ask once, as a command does
		askers.Go(func() {
			for {
				e, err := s.Get(t.Context(), "desired/prod/web/app")
				if t.Context().Err() != nil {
					return
				}
				if err != nil {
					continue
				}
				if got := "app=" + string(e.Value); got != want {
					t.Errorf("a get answered %s", got)
				}
				return
			}
		})
		askers.Go(func() {
			for {
				l, err := s.List(t.Context(), "desired/prod/web/")
				if t.Context().Err() != nil {
					return
				}
				if err != nil {
					continue
				}
				if got := kvtest.Values(kv.View{Entries: l}); got != want {
					t.Errorf("a list answered %q", got)
				}
				return
			}
		})
	}
	askers.Wait()
	for _, v := range views {
		v.Await(t, "the newest record", kvtest.Healthy(want))
		v.Never(t, "an old record was believed", old)
	}
	t.Logf("all %d views are up to date %v after the servers were started again",
		len(views), time.Since(started).Round(time.Millisecond))
}
