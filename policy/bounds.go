package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"kedge/deployments"
)

// Bounds are what a node's own configuration allows, whatever KV says. The zero value allows everything.
type Bounds struct {
	// Sources are URL prefixes (whole path segments) that a release may come from; empty: any.
	Sources []string
	// Dests are directories in or below which Dest may lie; empty: any.
	Dests []string
	// Users that commands may run as, and that may own the tree, as the manifest names them; empty: any.
	// NoCommands forbids commands, the exec health checks with them.
	Users      []string
	NoCommands bool
}

// CheckSource reports why nothing may be fetched from a URL; nil: it may.
func (b Bounds) CheckSource(url string) error {
	if len(b.Sources) == 0 {
		return nil
	}
	for _, prefix := range b.Sources {
		// The exact URL of one release is a prefix of its own.
		if url == prefix || deployments.UnderPrefix(url, prefix) {
			return nil
		}
	}
	return fmt.Errorf("%s is not from %s, which is all that this node's configuration allows", url, strings.Join(b.Sources, ", "))
}

// CheckManifest reports the first thing of a manifest that the bounds don't allow. It takes users by the name that the manifest
// uses: who a number is, or as whom the agent runs, only the node knows. A command without a user is refused where Users is set.
func (b Bounds) CheckManifest(m *deployments.Manifest) error {
	var sources []string
	if m.Src != "" {
		sources = append(sources, m.Src)
	}
	if m.Index != nil {
		sources = append(sources, m.Index.URL)
	}
	for _, d := range m.Deltas {
		sources = append(sources, d.URL)
	}
	for _, s := range sources {
		if err := b.CheckSource(s); err != nil {
			return err
		}
	}
	if m.Dest != "" && !b.holds(m.Dest) {
		return fmt.Errorf("dest %s is outside of %s, which is all that this node's configuration allows", m.Dest, strings.Join(b.Dests, ", "))
	}
	if owner, _, _ := strings.Cut(m.Owner, ":"); owner != "" {
		if err := b.checkUser(owner); err != nil {
			return fmt.Errorf("owner: %w", err)
		}
	}
	for _, c := range slices.Concat(m.Commands.Pre, m.Commands.Post, m.Commands.Success, m.Commands.Failure) {
		if b.NoCommands {
			return fmt.Errorf("it has the command %q, and this node's configuration allows none", c.Run)
		}
		if err := b.checkUser(c.User); err != nil {
			return fmt.Errorf("command %q: %w", c.Run, err)
		}
	}
	for _, c := range m.Health.Checks {
		if c.Exec == "" {
			continue
		}
		if b.NoCommands {
			return fmt.Errorf("it has the health check %q, and this node's configuration allows no commands", c.Exec)
		}
		if err := b.checkUser(""); err != nil {
			return fmt.Errorf("health check %q: %w", c.Exec, err)
		}
	}
	return nil
}

// holds reports whether dest is one of Dests or lies below one, by whole path segments.
func (b Bounds) holds(dest string) bool {
	if len(b.Dests) == 0 {
		return true
	}
	if !path.IsAbs(dest) || path.Clean(dest) != dest {
		return false
	}
	return slices.ContainsFunc(b.Dests, func(dir string) bool {
		dir = path.Clean(dir)
		return dest == dir || strings.HasPrefix(dest, strings.TrimSuffix(dir, "/")+"/")
	})
}

func (b Bounds) checkUser(name string) error {
	switch {
	case len(b.Users) == 0 || slices.Contains(b.Users, name):
		return nil
	case name == "":
		return fmt.Errorf("it names no user, and this node's configuration allows %s only", strings.Join(b.Users, ", "))
	}
	return fmt.Errorf("user %s is not among %s, which is all that this node's configuration allows", name, strings.Join(b.Users, ", "))
}
