package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv/consul"
	"kedge/sync/command"
)

const maxBody = 64 << 10 // bytes of an answer that are searched for HTTPCheck.Contains

// newProbe returns a check's probe. env is the environment of an exec check.
func newProbe(c deployments.Check, env command.Env) probe {
	switch {
	case c.HTTP != nil:
		return func(ctx context.Context) (string, error) { return "", checkHTTP(ctx, c.HTTP) }
	case c.TCP != "":
		return func(ctx context.Context) (string, error) { return "", checkTCP(ctx, c.TCP) }
	case c.Exec != "":
		return func(ctx context.Context) (string, error) {
			// The command's output is not logged, as a check is tried again and again. The error contains its last line.
			return "", command.Check(ctx, deployments.Command{Run: c.Exec, User: c.User, Timeout: c.Timeout}, env)
		}
	case c.Systemd != "":
		return func(ctx context.Context) (string, error) { return checkSystemd(ctx, c.Systemd) }
	default:
		return func(ctx context.Context) (string, error) { return "", checkConsul(ctx, c.Consul) }
	}
}

// checkHTTP passes if the answer to one request, on a new connection and without a proxy, is as c demands. It doesn't
// follow a redirect, which may lead to another service: the redirect itself is the answer.
func checkHTTP(ctx context.Context, c *deployments.HTTPCheck) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "kedge-health")
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return cause(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case c.Status != 0 && resp.StatusCode != c.Status:
		return fmt.Errorf("status %d, want %d", resp.StatusCode, c.Status)
	case c.Status == 0 && resp.StatusCode/100 != 2:
		return fmt.Errorf("status %d, want 2xx", resp.StatusCode)
	case c.Contains == "":
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return cause(ctx, err)
	}
	if !bytes.Contains(body, []byte(c.Contains)) {
		return fmt.Errorf("%q is not in the first %d bytes of the answer", c.Contains, len(body))
	}
	return nil
}

func checkTCP(ctx context.Context, address string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return cause(ctx, err)
	}
	return conn.Close()
}

// checkSystemd passes while a unit is active. The identity that it returns is the unit's invocation ID, which changes
// with a restart.
func checkSystemd(ctx context.Context, unit string) (string, error) {
	out, err := exec.CommandContext(ctx, "systemctl", "show", "--property=LoadState,ActiveState,SubState,InvocationID",
		"--", unit).
		Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return "", cause(ctx, err)
	}
	return systemdState(string(out))
}

// systemdState parses the NAME=VALUE lines of systemctl show. It returns an error unless the unit is loaded and active.
func systemdState(out string) (invocation string, _ error) {
	p := make(map[string]string)
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		p[name] = value
	}
	switch {
	case p["LoadState"] != "loaded":
		return "", fmt.Errorf("the unit is %s", p["LoadState"])
	case p["ActiveState"] != "active":
		return "", fmt.Errorf("the unit is %s (%s)", p["ActiveState"], p["SubState"])
	}
	return p["InvocationID"], nil
}

// checkConsul passes if the local agent has the service, and all checks of the service pass. Consul's environment
// variables say where the agent is. The client is new for each try, so that a token file is read again. Maintenance
// mode, which the drain may have turned on, is ignored.
func checkConsul(ctx context.Context, service string) error {
	config := api.DefaultNonPooledConfig()
	client, err := api.NewClient(config)
	if err == nil {
		err = consul.CheckAddress(config.Address)
	}
	if err != nil {
		return fmt.Errorf("setting up the Consul client from the environment, as CONSUL_HTTP_ADDR and CONSUL_CACERT: %w", err)
	}
	q := (&api.QueryOptions{}).WithContext(ctx)
	_, services, err := client.Agent().AgentHealthServiceByNameOpts(service, q)
	if syntax := new(json.SyntaxError); errors.As(err, &syntax) {
		// The client ignores this answer's status: an answer that doesn't parse is the text of a refusal.
		return errors.New("the local Consul agent refused to answer: probably the token lacks service:read")
	}
	if err != nil {
		return cause(ctx, fmt.Errorf("asking the local Consul agent: %w", err))
	}
	return consulState(services)
}

func consulState(services []api.AgentServiceChecksInfo) error {
	if len(services) == 0 {
		return errors.New("the service is not registered with the local Consul agent")
	}
	for _, s := range services {
		for _, c := range s.Checks {
			if c.CheckID == api.NodeMaint || strings.HasPrefix(c.CheckID, api.ServiceMaintPrefix) ||
				c.Status == api.HealthPassing {
				continue
			}
			return fmt.Errorf("check %q is %s", c.Name, c.Status)
		}
	}
	return nil
}

// cause returns the cause of ctx's end if ctx has ended, and err otherwise.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
