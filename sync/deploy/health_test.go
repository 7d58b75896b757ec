package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv/kvtest"
	"kedge/sync/command"
)

// TestAwaitHealthy plays checks whose answers are a function of the time since the switch.
func TestAwaitHealthy(t *testing.T) {
	t.Parallel()
	down := errors.New("down")
	type answers func(at time.Duration) (string, error)
	always := func(at time.Duration) (string, error) { return "", nil }
	from := func(begin time.Duration) answers {
		return func(at time.Duration) (string, error) {
			if at < begin {
				return "", down
			}
			return "", nil
		}
	}
	for name, test := range map[string]struct {
		checks          []answers
		timeout, stable time.Duration
		interval        time.Duration // default 1 s
		first           time.Duration // the first check's, where it is another
		ends            time.Duration // when observe returns, to the second
		err             string
	}{
		"at once":               {checks: []answers{always}, timeout: time.Minute},
		"no checks":             {timeout: time.Minute, stable: time.Minute},
		"comes up":              {checks: []answers{always, from(7 * time.Second)}, timeout: time.Minute, ends: 7 * time.Second},
		"comes up and stays":    {checks: []answers{from(7 * time.Second)}, timeout: time.Minute, stable: 30 * time.Second, ends: 37 * time.Second},
		"stable beyond timeout": {checks: []answers{from(59 * time.Second)}, timeout: time.Minute, stable: time.Hour, ends: time.Hour + 59*time.Second},
		"too late":              {checks: []answers{always, from(61 * time.Second)}, timeout: time.Minute, ends: time.Minute, err: "second: down"},
		"flaps for ever": {checks: []answers{func(at time.Duration) (string, error) {
			return "", map[bool]error{true: down}[at/time.Second%4 == 3]
		}}, timeout: 58 * time.Second, stable: 5 * time.Second, ends: 59 * time.Second, err: "down"},
		"fails while it is stable": {checks: []answers{func(at time.Duration) (string, error) { return "", map[bool]error{true: down}[at > 90*time.Second] }}, timeout: time.Minute, stable: 2 * time.Minute, ends: 91 * time.Second, err: "down"},
		"flaps, then settles": {checks: []answers{func(at time.Duration) (string, error) {
			return "", map[bool]error{true: down}[at == 10*time.Second]
		}}, timeout: time.Minute, stable: 15 * time.Second, ends: 26 * time.Second},
		"restarts all the while": {checks: []answers{func(at time.Duration) (string, error) { return fmt.Sprint(at / (4 * time.Second)), nil }},
			timeout: time.Minute, stable: 10 * time.Second, ends: 64 * time.Second, err: "not for long enough"},
		"restarts once": {checks: []answers{func(at time.Duration) (string, error) { return fmt.Sprint(at < 8*time.Second), nil }},
			timeout: time.Minute, stable: 10 * time.Second, ends: 18 * time.Second},
		"tried rarely, and fails meanwhile": {checks: []answers{func(at time.Duration) (string, error) { return "", map[bool]error{true: down}[at >= 5*time.Second] }},
			timeout: time.Minute, stable: 10 * time.Second, interval: 10 * time.Minute, ends: time.Minute, err: "down"},
		"tried rarely, and restarts meanwhile": {checks: []answers{func(at time.Duration) (string, error) { return fmt.Sprint(at < 5*time.Second), nil }},
			timeout: time.Minute, stable: 10 * time.Second, interval: 30 * time.Second, ends: 20 * time.Second},
		"tried rarely":               {checks: []answers{always, from(7 * time.Second)}, timeout: time.Minute, stable: 10 * time.Second, interval: 30 * time.Second, ends: 20 * time.Second},
		"comes up between two tries": {checks: []answers{from(time.Second)}, timeout: time.Minute, stable: 20 * time.Second, interval: 50 * time.Second, ends: 40 * time.Second},
		"fails in the last moment": {checks: []answers{func(at time.Duration) (string, error) { return "", map[bool]error{true: down}[at >= 10*time.Second] }},
			timeout: 30 * time.Second, stable: 10 * time.Second, ends: 30 * time.Second, err: "down"},
		"once is enough": {checks: []answers{always, from(7 * time.Second)}, timeout: time.Minute, first: 30 * time.Second, ends: 7 * time.Second},
		"never answers":  {checks: []answers{func(time.Duration) (string, error) { return "", errHang }}, timeout: time.Minute, ends: time.Minute, err: "no answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				var watched []watch
				for i, answer := range test.checks {
					interval := cmp.Or(test.interval, time.Second)
					if i == 0 {
						interval = cmp.Or(test.first, interval)
					}
					watched = append(watched, watch{name: []string{"first", "second"}[i],
						interval: probeInterval(interval, test.stable),
						timeout:  5 * time.Second,
						try: func(ctx context.Context) (string, error) {
							identity, err := answer(time.Since(begin))
							if errors.Is(err, errHang) {
								<-ctx.Done()
								return "", context.Cause(ctx)
							}
							return identity, err
						}})
				}
				err := awaitHealthy(t.Context(), watched, test.timeout, test.stable)
				if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %v, want %q", err, test.err)
				}
				if took := time.Since(begin); took != test.ends {
					t.Errorf("took %s, want %s", took, test.ends)
				}
			})
		})
	}
}

func TestOften(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ interval, stable, want time.Duration }{
		{time.Second, 0, time.Second},
		{time.Hour, 0, time.Hour},
		{time.Second, time.Minute, time.Second},
		{time.Minute, 10 * time.Second, 10 * time.Second},
		{time.Minute, time.Millisecond, time.Second}, // no check is tried all the time for that
		{time.Millisecond, 10 * time.Millisecond, time.Millisecond},
	} {
		if got := probeInterval(test.interval, test.stable); got != test.want {
			t.Errorf("interval %s, stable for %s: tried every %s, want %s", test.interval, test.stable, got, test.want)
		}
	}
}

var errHang = errors.New("hangs")

func TestAwaitHealthyEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		superseded := errors.New("superseded")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(superseded) })
		hangs := func(ctx context.Context) (string, error) {
			<-ctx.Done()
			return "", context.Cause(ctx)
		}
		err := awaitHealthy(ctx, []watch{{interval: time.Second, timeout: time.Second, try: hangs}}, time.Minute, 0)
		if !errors.Is(err, superseded) {
			t.Errorf("got %v", err)
		}
	})
}

// No try goes on beside what comes after the checks.
func TestAwaitHealthyWaitsForItsTries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		trying := false
		slow := func(ctx context.Context) (string, error) {
			trying = true
			<-ctx.Done()
			time.Sleep(4 * time.Second) // until its processes have ended
			trying = false
			return "", context.Cause(ctx)
		}
		watched := []watch{{interval: time.Second, timeout: time.Minute, try: slow}}
		err := awaitHealthy(t.Context(), watched, time.Second, 0)
		if err == nil || trying {
			t.Errorf("got %v, and a try goes on: %v", err, trying)
		}
	})
}

// What a manifest says of health decides, and while dest leads elsewhere no check has passed.
func TestHealthOfARelease(t *testing.T) {
	t.Parallel()
	hanging := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Cleanup(hanging.Close)
	for name, test := range map[string]struct {
		health deployments.Health
		err    string
	}{
		"without checks": {},
		"dest is led elsewhere for a moment": {health: deployments.Health{Checks: []deployments.Check{{
			Exec: `if mkdir ROOT/moved; then ln -sfn ROOT DEST; else ln -sfn "$KEDGE_RELEASE" DEST; fi`, Interval: 5 * time.Millisecond}}}},
		"fails within stable_for": {health: deployments.Health{Timeout: time.Second, StableFor: time.Millisecond,
			Checks: []deployments.Check{{Exec: "mkdir ROOT/once", Interval: 5 * time.Millisecond}}}, err: "not healthy within 1s: exec: "},
		"fails within stable_for, and is tried rarely": {health: deployments.Health{Timeout: time.Second, StableFor: time.Millisecond,
			Checks: []deployments.Check{{Exec: "mkdir ROOT/once", Interval: time.Hour}}}, err: "not healthy within 1s: exec: "},
		"tried often": {health: deployments.Health{Timeout: 15 * time.Second, Checks: []deployments.Check{{
			Exec: "echo >> ROOT/tries; test $(wc -l < ROOT/tries) = 20", Interval: 5 * time.Millisecond}}}},
		"a try that takes too long": {health: deployments.Health{Timeout: time.Second, Checks: []deployments.Check{{
			HTTP: &deployments.HTTPCheck{URL: hanging.URL}, Timeout: 10 * time.Millisecond, Interval: 5 * time.Millisecond}}}, err: "no answer within 10ms"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			names := strings.NewReplacer("ROOT", w.root, "DEST", w.dest())
			p := w.publish("1", func(m *deployments.Manifest) {
				for i := range test.health.Checks {
					test.health.Checks[i].Exec = names.Replace(test.health.Checks[i].Exec)
				}
				m.Health = test.health
			})
			err := w.open(nil).Deploy(t.Context(), Request{Release: p})
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("got %v, want %q", err, test.err)
			}
		})
	}
}

func TestChecks(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			fmt.Fprint(w, "version 2")
		case "/moved":
			http.Redirect(w, r, "/ok", http.StatusFound)
		case "/hangs":
			<-r.Context().Done()
		case "/endless":
			for part := make([]byte, 4<<10); ; {
				if _, err := w.Write(part); err != nil {
					return
				}
			}
		default:
			http.Error(w, "version 2", http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(server.Close)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	web := func(path string, status int, contains string) deployments.Check {
		return deployments.Check{HTTP: &deployments.HTTPCheck{URL: server.URL + path, Status: status, Contains: contains}}
	}
	for _, test := range []struct {
		check deployments.Check
		err   string
	}{
		{web("/ok", 0, ""), ""},
		{web("/ok", 0, "version 2"), ""},
		{web("/ok", 0, "version 3"), `"version 3" is not in`},
		{web("/ok", 204, ""), "status 200, want 204"},
		{web("/", 0, "version 2"), "status 503, want 2xx"},
		{web("/", 503, ""), ""},
		{web("/moved", 0, ""), "status 302"},
		{web("/moved", 302, ""), ""},
		{web("/hangs", 0, ""), "slow"},
		{web("/endless", 0, "version 2"), "is not in the first 65536 bytes"},
		{deployments.Check{TCP: server.Listener.Addr().String()}, ""},
		{deployments.Check{TCP: closed.Addr().String()}, "refused"},
		{deployments.Check{Exec: `test "$KEDGE_VERSION" = 2`}, ""},
		{deployments.Check{Exec: "echo not yet; false"}, "not yet"},
		{deployments.Check{Exec: "sleep 1000"}, "slow"},
		{deployments.Check{Exec: "true", User: "nobody-here"}, "nobody-here"},
	} {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("too slow"))
		_, err := newProbe(test.check, command.Env{Version: "2"})(ctx)
		cancel()
		if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v, want %q", nameOf(test.check), err, test.err)
		}
	}
}

func TestSystemdState(t *testing.T) {
	t.Parallel()
	for out, want := range map[string]string{
		"LoadState=loaded\nActiveState=active\nSubState=running\nInvocationID=abc\n":        "abc",
		"LoadState=loaded\nActiveState=active\nSubState=exited\nInvocationID=\n":            "",
		"LoadState=loaded\nActiveState=activating\nSubState=auto-restart\nInvocationID=a\n": "the unit is activating (auto-restart)",
		"LoadState=not-found\nActiveState=inactive\nSubState=dead\n":                        "the unit is not-found",
		"": "the unit is ",
	} {
		got, err := systemdState(out)
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", out, got, want)
		}
	}
}

func TestConsulState(t *testing.T) {
	t.Parallel()
	checks := func(cs ...*api.HealthCheck) []api.AgentServiceChecksInfo {
		return []api.AgentServiceChecksInfo{{Checks: api.HealthChecks(cs)}}
	}
	passing := &api.HealthCheck{CheckID: "a", Name: "a", Status: api.HealthPassing}
	for name, test := range map[string]struct {
		services []api.AgentServiceChecksInfo
		err      string
	}{
		"absent":              {nil, "not registered"},
		"no checks":           {checks(), ""},
		"passing":             {checks(passing), ""},
		"warning":             {checks(passing, &api.HealthCheck{CheckID: "b", Name: "b", Status: api.HealthWarning}), `check "b" is warning`},
		"of another instance": {append(checks(passing), checks(&api.HealthCheck{CheckID: "b", Name: "b", Status: api.HealthCritical})...), `check "b" is critical`},
		"maintenance":         {checks(passing, &api.HealthCheck{CheckID: api.NodeMaint, Status: api.HealthCritical}), ""},
		"of service":          {checks(passing, &api.HealthCheck{CheckID: api.ServiceMaintPrefix + "x", Status: api.HealthCritical}), ""},
	} {
		if err := consulState(test.services); (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v, want %q", name, err, test.err)
		}
	}
}

// TestConsulCheck asks a real agent. It sets the environment, so it isn't parallel.
func TestConsulCheck(t *testing.T) {
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	for _, kv := range consul.Env(consul.RootToken) {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	agent := consul.Client().Agent()
	want := func(text string) {
		t.Helper()
		_, err := newProbe(deployments.Check{Consul: "web"}, command.Env{})(t.Context())
		if (err == nil) != (text == "") || err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %q", err, text)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want("not registered")
	must(agent.ServiceRegister(&api.AgentServiceRegistration{Name: "web", Check: &api.AgentServiceCheck{CheckID: "web", TTL: "1h"}}))
	want("is critical")
	must(agent.UpdateTTL("web", "", api.HealthPassing))
	want("")
	must(agent.EnableNodeMaintenance("a deployment"))
	want("")
	must(agent.UpdateTTL("web", "", api.HealthWarning))
	want("is warning")
	t.Setenv("CONSUL_HTTP_TOKEN", "")
	want("lacks service:read")
}

// The reports of nodes have the errors of checks.
func TestConsulCheckShowsNoPassword(t *testing.T) {
	for _, address := range []string{"me:secret@127.0.0.1:8500", "http://me:secret@127.0.0.1:8500"} {
		t.Setenv("CONSUL_HTTP_ADDR", address)
		_, err := newProbe(deployments.Check{Consul: "web"}, command.Env{})(t.Context())
		if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "CONSUL_HTTP_AUTH") {
			t.Errorf("with the address %s: %v", address, err)
		}
	}
}
