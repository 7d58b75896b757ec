package deployments

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml"
)

// Encode returns a manifest as YAML, as kedge publish writes it, without fields that are zero or hold their default.
// ParseManifest of the result, at the same URL, returns m with its defaults filled in. More than MaxManifest bytes are
// an error.
func (m *Manifest) Encode() ([]byte, error) {
	var out yaml.MapSlice
	add := func(to *yaml.MapSlice, key string, value any, when bool) {
		if when {
			if text, ok := value.(string); ok {
				value = scalar(text)
			}
			*to = append(*to, yaml.MapItem{Key: key, Value: value})
		}
	}
	blob := func(b Blob) yaml.MapSlice {
		return yaml.MapSlice{
			{Key: "url", Value: scalar(b.URL)},
			{Key: "size", Value: b.Size},
			{Key: "sha256", Value: b.SHA256.String()},
		}
	}
	add(&out, "name", m.Name, m.Name != "")
	add(&out, "version", m.Version, m.Version != "")
	add(&out, "created", m.Created.UTC().Format("2006-01-02T15:04:05Z"), !m.Created.IsZero())
	add(&out, "src", m.Src, m.Src != "")
	add(&out, "checksum", m.Checksum, m.Checksum != "")
	add(&out, "size", m.Size, m.Size != 0)
	if m.Index != nil {
		add(&out, "index", blob(*m.Index), true)
	}
	var deltas []yaml.MapSlice
	for _, d := range m.Deltas {
		deltas = append(deltas, append(yaml.MapSlice{{Key: "from", Value: d.From.String()}}, blob(d.Blob)...))
	}
	add(&out, "deltas", deltas, len(deltas) > 0)
	add(&out, "dest", m.Dest, m.Dest != "")
	add(&out, "dest_mode", fmt.Sprintf("0%o", m.DestMode), m.DestMode != 0 && m.DestMode != 0o755)
	add(&out, "sync_strategy", string(m.Strategy), m.Strategy != "" && m.Strategy != StrategyRsync)
	var excludes []scalar
	for _, e := range m.Excludes {
		excludes = append(excludes, scalar(e))
	}
	add(&out, "excludes", excludes, len(excludes) > 0)
	add(&out, "exclude_from", m.ExcludeFrom, m.ExcludeFrom != "")
	add(&out, "owner", m.Owner, m.Owner != "")
	add(&out, "keep", m.Keep, m.Keep != 0 && m.Keep != defaultKeep)
	var shared []scalar
	for _, p := range m.Shared {
		shared = append(shared, scalar(p))
	}
	add(&out, "shared", shared, len(shared) > 0)
	add(&out, "symlinks", string(m.Symlinks), m.Symlinks != "" && m.Symlinks != SymlinksInside)
	add(&out, "immutable", true, m.Immutable)

	// This is the timeout that ParseManifest gives a command without one.
	timeout := DefaultCommandTimeout
	if !m.isKedgesOwn() {
		timeout = stretchersTimeout
	}
	var commands yaml.MapSlice
	var env yaml.MapSlice
	for _, name := range slices.Sorted(maps.Keys(m.Commands.Env)) {
		env = append(env, yaml.MapItem{Key: name, Value: scalar(m.Commands.Env[name])})
	}
	add(&commands, "env", env, len(env) > 0)
	for _, list := range []struct {
		name     string
		commands []Command
	}{{"pre", m.Commands.Pre}, {"post", m.Commands.Post}, {"success", m.Commands.Success}, {"failure", m.Commands.Failure}} {
		var items []any
		for _, c := range list.commands {
			if (c.Timeout == 0 || c.Timeout == timeout) && c.User == "" && !c.Once {
				items = append(items, scalar(c.Run))
				continue
			}
			item := yaml.MapSlice{{Key: "run", Value: scalar(c.Run)}}
			add(&item, "timeout", c.Timeout.String(), c.Timeout != 0 && c.Timeout != timeout)
			add(&item, "user", c.User, c.User != "")
			add(&item, "once", true, c.Once)
			items = append(items, item)
		}
		add(&commands, list.name, items, len(items) > 0)
	}
	add(&out, "commands", commands, len(commands) > 0)
	var secrets yaml.MapSlice
	for _, name := range slices.Sorted(maps.Keys(m.Secrets)) {
		secrets = append(secrets, yaml.MapItem{Key: name, Value: scalar(m.Secrets[name])})
	}
	add(&out, "secrets", secrets, len(secrets) > 0)

	var health yaml.MapSlice
	add(&health, "timeout", m.Health.Timeout.String(), m.Health.Timeout != 0 && m.Health.Timeout != defaultHealthTimeout)
	add(&health, "stable_for", m.Health.StableFor.String(), m.Health.StableFor != 0)
	add(&health, "every", m.Health.Every.String(), m.Health.Every != 0 && m.Health.Every != defaultHealthEvery)
	add(&health, "failures", m.Health.Failures, m.Health.Failures != 0 && m.Health.Failures != defaultHealthFailures)
	var checks []yaml.MapSlice
	for _, c := range m.Health.Checks {
		var item yaml.MapSlice
		if c.HTTP != nil {
			http := yaml.MapSlice{{Key: "url", Value: scalar(c.HTTP.URL)}}
			add(&http, "status", c.HTTP.Status, c.HTTP.Status != 0)
			add(&http, "contains", c.HTTP.Contains, c.HTTP.Contains != "")
			add(&item, "http", http, true)
		}
		add(&item, "tcp", c.TCP, c.TCP != "")
		add(&item, "exec", c.Exec, c.Exec != "")
		add(&item, "user", c.User, c.User != "")
		add(&item, "systemd", c.Systemd, c.Systemd != "")
		add(&item, "consul", c.Consul, c.Consul != "")
		add(&item, "interval", c.Interval.String(), c.Interval != 0 && c.Interval != defaultCheckInterval)
		add(&item, "timeout", c.Timeout.String(), c.Timeout != 0 && c.Timeout != defaultCheckTimeout)
		add(&item, "during", string(c.During), c.During != "")
		checks = append(checks, item)
	}
	add(&health, "checks", checks, len(checks) > 0)
	add(&out, "health", health, len(health) > 0)
	add(&out, "drain", m.Drain.String(), m.Drain != 0)

	data, err := yaml.MarshalWithOptions(out, yaml.IndentSequence(true))
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	if len(data) > MaxManifest {
		return nil, fmt.Errorf("the manifest has %d bytes, at most %d are allowed", len(data), MaxManifest)
	}
	return data, nil
}

// isKedgesOwn reports whether Encode writes a top-level field or a strategy that stretcher doesn't
// know. Such a manifest is kedge's own, not stretcher's.
func (m *Manifest) isKedgesOwn() bool {
	h := m.Health
	return m.Name != "" || m.Version != "" || !m.Created.IsZero() || m.Size != 0 || m.Index != nil || len(m.Deltas) > 0 ||
		len(
			m.Secrets,
		) > 0 || m.Strategy == StrategyRelease || m.Owner != "" || m.Keep != 0 && m.Keep != defaultKeep ||
		len(m.Shared) > 0 ||
		m.Symlinks != "" &&
			m.Symlinks != SymlinksInside || m.Immutable || m.Drain != 0 || len(h.Checks) > 0 || h.StableFor != 0 ||
		h.Timeout != 0 && h.Timeout != defaultHealthTimeout || h.Every != 0 && h.Every != defaultHealthEvery ||
		h.Failures != 0 && h.Failures != defaultHealthFailures
}

// scalar is text that is quoted in YAML, unless every YAML reader takes it for text unquoted.
type scalar string

// bare matches text that needs no quotes, as every reader of YAML takes it for text. It also matches words such as true
// and no, which do need quotes.
var bare = regexp.MustCompile(`^[A-Za-z/]([A-Za-z0-9._/@+=:-]*[A-Za-z0-9._/@+=-])?$`)

func (s scalar) MarshalYAML() ([]byte, error) {
	switch {
	case bare.MatchString(string(s)) && !slices.Contains([]string{"true", "false", "null", "yes", "no", "on", "off", "y", "n"}, strings.ToLower(string(s))):
		return []byte(s), nil
	case strings.ContainsFunc(string(s), func(c rune) bool { return !unicode.IsPrint(c) }):
		return json.Marshal(string(s))
	}
	// Single quotes leave double ones alone, as variables ({{ env "NAME" }}) need.
	return []byte("'" + strings.ReplaceAll(string(s), "'", "''") + "'"), nil
}
