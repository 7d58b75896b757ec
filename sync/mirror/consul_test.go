package mirror

import (
	"errors"
	"strings"
	"testing"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

func (r *running) logs(words string) {
	r.tb.Helper()
	r.await("a log line", func() error {
		if !strings.Contains(r.log.String(), words) {
			return errors.New(words + " isn't there")
		}
		return nil
	})
}

// The mirror under default deny, with the rights that it needs and no others; without them; and while Consul is away.
func TestConsulRightsAndOutage(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	all := consul.Open(consul.RootToken)
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})

	poor := start(t, Config{Store: consul.Open(consul.Token(`key_prefix "kedge/" { policy = "read" }`)), Repo: o.Bare, Name: "poor"})
	poor.logs("ermission denied")
	poor.stop()
	if _, err := all.Get(t.Context(), "desired/prod/web/app"); !errors.Is(err, kv.ErrNotFound) {
		t.Errorf("without rights: %v", err)
	}

	token := consul.Token(`key_prefix "kedge/" { policy = "write" } session_prefix "" { policy = "write" }`)
	store := &recorder{Store: consul.Open(token)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(first)
	store.taken()

	server := consul.Servers[0]
	server.Suspend()
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	if err := wait.For(t.Context(), 2*time.Second); err != nil {
		t.Fatal(err)
	}
	server.Resume()
	m.at(second)
	if got := m.runs("prod/web/app", "app/2"); got.Generation != 2 || got.Stable != pointer("app/1") {
		t.Errorf("after the outage: %+v", got)
	}
	if got := m.runs("prod/web/base", "base/1"); got.Generation != 1 {
		t.Errorf("after the outage: %+v", got)
	}

	// An operator's own tool.
	consul.CLI(consul.RootToken, pointer("hand/1").String()+"\n", "kv", "put", "kedge/desired/prod/web/base", "-")
	m.await("the change by hand to be put back", func() error {
		if len(store.taken()) == 0 {
			return errors.New("nothing was written")
		}
		return nil
	})
	m.runs("prod/web/base", "base/1")
}
