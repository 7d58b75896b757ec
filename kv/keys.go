package kv

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"kedge/deployments"
)

// DefaultPrefix is the prefix of all of kedge's keys in Consul KV, unless another is configured.
const DefaultPrefix = "kedge/"

// Prefixes of keys, and three keys, relative to the store's prefix. The package comment says who writes them. The kind
// comes first, so that an ACL can bound each party to its own keys.
const (
	DesiredPrefix = "desired/"
	PinsPrefix    = "pins/"
	ControlPrefix = "control/"
	StatusPrefix  = "status/"
	HistoryPrefix = "history/"
	MirrorKey     = "mirror/state"
	MirrorLease   = "mirror/lease"
	MirrorHook    = "mirror/hook"
	MirrorPrefix  = "mirror/"
)

func DesiredKey(id deployments.UnitID) string { return DesiredPrefix + id.String() }
func PinKey(id deployments.UnitID) string     { return PinsPrefix + id.String() }
func NodePinKey(id deployments.UnitID, node string) string {
	return PinsPrefix + id.String() + "/" + node
}
func ControlKey(id deployments.UnitID) string { return ControlPrefix + id.String() }
func StatusKey(stage, role, node string) string {
	return StatusPrefix + stage + "/" + role + "/" + node
}
func HistoryPrefixOf(id deployments.UnitID) string { return HistoryPrefix + id.String() + "/" }

// RolePrefix returns the prefix of one role's keys of a kind, such as desired/prod/web/ for DesiredPrefix.
func RolePrefix(kind, stage, role string) string { return kind + stage + "/" + role + "/" }

// HistoryKey returns the key of one generation of a unit's history. Its ten digits make these keys sort by generation.
func HistoryKey(id deployments.UnitID, generation int64) string {
	return fmt.Sprintf("%s%010d", HistoryPrefixOf(id), generation)
}

// Key is a parsed key of the store.
type Key struct {
	Kind string // DesiredPrefix, PinsPrefix, ControlPrefix, StatusPrefix or HistoryPrefix
	Role deployments.RoleID
	// Unit is the unit's name; empty for a node's status.
	Unit string
	// Node is the node of a status or of a node's pin; empty for a pin of all nodes, and for other kinds.
	Node string
	// Generation is the generation of a history entry; 0 for other kinds.
	Generation int64
}

// UnitID returns the unit that the key is for. For a status key, its Unit is empty.
func (k Key) UnitID() deployments.UnitID { return k.Role.Unit(k.Unit) }

// ParseKey parses a key of a unit or of a node, relative to the store's prefix. Every other key is
// an error, such as a folder key, a key below MirrorPrefix, or one with a part that
// deployments.CheckSegment refuses.
func ParseKey(key string) (Key, error) {
	parts := strings.Split(key, "/")
	k := Key{Kind: parts[0] + "/"}
	var names string // what follows the kind
	least, most := 4, 4
	switch k.Kind {
	case DesiredPrefix, ControlPrefix:
		names = "STAGE/ROLE/UNIT"
	case PinsPrefix:
		names, most = "STAGE/ROLE/UNIT or STAGE/ROLE/UNIT/NODE", 5
	case StatusPrefix:
		names = "STAGE/ROLE/NODE"
	case HistoryPrefix:
		names, least, most = "STAGE/ROLE/UNIT/GENERATION", 5, 5
	default:
		return Key{}, errors.New("want a key below desired/, pins/, control/, status/ or history/")
	}
	if len(parts) < least || len(parts) > most {
		return Key{}, fmt.Errorf("want %s%s", k.Kind, names)
	}

	k.Role = deployments.RoleID{Stage: parts[1], Role: parts[2]}
	if k.Kind == StatusPrefix {
		k.Node = parts[3]
		if err := errors.Join(k.Role.Check(), deployments.CheckSegment("node", k.Node)); err != nil {
			return Key{}, err
		}
		return k, nil
	}
	k.Unit = parts[3]
	err := k.UnitID().Check()
	switch {
	case err != nil || len(parts) == 4:
	case k.Kind == PinsPrefix:
		k.Node = parts[4]
		err = deployments.CheckSegment("node", k.Node)
	default:
		k.Generation, err = strconv.ParseInt(parts[4], 10, 64)
		if err != nil || k.Generation < 0 {
			err = fmt.Errorf("generation %q: want a number", parts[4])
		}
	}
	if err != nil {
		return Key{}, err
	}
	return k, nil
}
