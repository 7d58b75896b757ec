package command

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// private are variables that no command gets, beside KEDGE_…: credentials, and what systemd passed to the agent alone.
var private = []string{
	"CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_HTTP_AUTH", "CONSUL_CLIENT_KEY",
	"OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
	"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
	"CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM",
}

// agentOnlyPrefixes are prefixes, in upper case, of variables that may be credentials or lead to them: see isOwnUsers.
var agentOnlyPrefixes = []string{
	"AWS_",
	"CONSUL_",
	"VAULT_",
	"NOMAD_",
	"GOOGLE_",
	"GCLOUD_",
	"CLOUDSDK_",
	"GCE_METADATA_",
	"AZURE_",
	"ARM_",
	"DOCKER_",
	"KUBECONFIG",
	"GIT_ASKPASS",
	"SSH_",
	"GPG_",
	"NETRC",
	"NPM_CONFIG_",
	"DBUS_",
	"XDG_RUNTIME_DIR",
}

// harmlessVars are the names of variables that match agentOnlyPrefixes but are no secrets: all commands get them.
var harmlessVars = []string{"AWS_REGION", "AWS_DEFAULT_REGION", "CONSUL_HTTP_ADDR"}

// isOwnUsers reports whether only commands of the agent's own user get a variable. That is so if
// its name begins with one of agentOnlyPrefixes, in any case, or says that it is secret
// (deployments.SecretName). It is also so if the value has a URL with a user name, password or
// token, such as a proxy's. The names in harmlessVars are exceptions.
func isOwnUsers(name, value string) bool {
	if slices.Contains(harmlessVars, name) {
		return false
	}
	upper := strings.ToUpper(name)
	begins := func(prefix string) bool { return strings.HasPrefix(upper, prefix) }
	if strings.HasSuffix(upper, "_PROXY") && !strings.Contains(value, "://") {
		value = "http://" + value // a proxy may be given without a scheme
	}
	return slices.ContainsFunc(agentOnlyPrefixes, begins) || deployments.SecretName(name) || safetext.URLs(value) != value
}

// environ returns a command's environment. It has those variables of agent, the agent's own environment, that the
// command may have, then userVars, and then env. Later variables replace earlier ones. userVars are another user's HOME
// and the like; nil: the command runs as the agent's user. PATH is defaultPath if agent has none.
func environ(agent []string, userVars []string, env Env) []string {
	out := make([]string, 0, len(agent)+20)
	path := false
	for _, kv := range agent {
		name, value, _ := strings.Cut(kv, "=")
		if isPrivate(name) || userVars != nil && isOwnUsers(name, value) {
			continue
		}
		path = path || name == "PATH"
		out = append(out, kv)
	}
	if !path {
		out = append(out, "PATH="+defaultPath)
	}
	digest := ""
	if !env.Digest.IsZero() {
		digest = env.Digest.String()
	}
	out = append(out, userVars...) // if a name occurs twice, os/exec uses the last
	for name, value := range env.Vars {
		out = append(out, name+"="+value)
	}
	out = append(out, "KEDGE_STAGE="+env.Unit.Stage, "KEDGE_ROLE="+env.Unit.Role, "KEDGE_UNIT="+env.Unit.Unit,
		"KEDGE_NODE="+env.Node, "KEDGE_STEP="+env.Step, "KEDGE_RELEASE="+env.Release,
		"KEDGE_PREVIOUS="+env.Previous, "KEDGE_DEST="+env.Dest, "KEDGE_DIGEST="+digest, "KEDGE_NAME="+env.Name,
		"KEDGE_VERSION="+env.Version, "KEDGE_COMMIT="+env.Commit,
		"KEDGE_ERROR="+strings.ReplaceAll(env.Error, "\x00", "\ufffd")) // with a NUL no command would run
	if env.Run != "" {
		out = append(out, runMark+env.Run)
	}
	return out
}

// LookupEnv is os.LookupEnv, but doesn't find the variables that no command inherits from the agent. Manifests may use
// the variables that it finds.
func LookupEnv(name string) (string, bool) {
	if isPrivate(name) {
		return "", false
	}
	return os.LookupEnv(name)
}

func isPrivate(name string) bool {
	return slices.Contains(private, name) || strings.HasPrefix(name, "KEDGE_")
}

// asUser makes cmd, whose SysProcAttr must not be nil, run as a user with all of the user's groups. name is the user's
// name or number. asUser returns the user's HOME, USER and LOGNAME. If name is empty or the agent's own user, it
// returns nil, and leaves cmd as it was. A number without an entry in the user database gets only the group of the same
// number.
func asUser(cmd *exec.Cmd, name string) ([]string, error) {
	if name == "" {
		return nil, nil
	}
	u, err := lookup(name)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", name, err)
	}
	uid, err := id(u.Uid)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", name, err)
	}
	if int(uid) == os.Geteuid() {
		return nil, nil
	}
	gid, err := id(u.Gid)
	if err != nil {
		return nil, fmt.Errorf("user %q: group: %w", name, err)
	}
	credential := &syscall.Credential{Uid: uid, Gid: gid}
	if u.Username != "" {
		groups, err := u.GroupIds()
		if err != nil {
			return nil, fmt.Errorf("user %q: its groups: %w", name, err)
		}
		for _, g := range groups {
			n, err := id(g)
			if err != nil {
				return nil, fmt.Errorf("user %q: its groups: %w", name, err)
			}
			credential.Groups = append(credential.Groups, n)
		}
	}
	cmd.SysProcAttr.Credential = credential
	return []string{"HOME=" + u.HomeDir, "USER=" + u.Username, "LOGNAME=" + u.Username}, nil
}

func lookup(name string) (*user.User, error) {
	u, err := user.Lookup(name)
	if err == nil {
		return u, nil
	}
	if _, numeric := id(name); numeric != nil {
		return nil, err
	}
	if u, err := user.LookupId(name); err == nil {
		return u, nil
	}
	return &user.User{Uid: name, Gid: name, HomeDir: "/"}, nil
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number: %w", s, err)
	}
	return uint32(n), nil
}
