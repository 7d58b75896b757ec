package policy

import (
	"fmt"
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
