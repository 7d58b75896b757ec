package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

func (s *Store) Commit(ctx context.Context, fence kv.Lease, ops ...kv.Op) error {
	if err := backend.CheckCommit(ops); err != nil {
		return err
	}
	if len(ops) == 0 {
		return nil
	}
	var held *lease
	var txn api.TxnOps
	if fence != nil {
		var ok bool
		if held, ok = fence.(*lease); !ok || held.session == "" {
			return backend.ErrForeignLease // with an empty session the check would pass on an unlocked key
		}
		if held.expired() {
			return fmt.Errorf("commit %s: %w", ops[0].Key, kv.ErrLeaseLost)
		}
		txn = append(txn, kvOp(&api.KVTxnOp{Verb: api.KVCheckSession, Key: held.key, Session: held.session}))
	}
	for _, op := range ops {
		txn = append(txn, s.txnOps(op)...)
	}
	err := s.do(ctx, "commit "+ops[0].Key, requestTimeout, func(q *api.QueryOptions) error {
		return s.txn(q, txn, held != nil)
	})
	if held != nil && errors.Is(err, kv.ErrLeaseLost) {
		held.lose()
	}
	return err
}

func (s *Store) txnOps(op kv.Op) api.TxnOps {
	key := s.prefix + op.Key
	switch op.Kind {
	case kv.OpPut:
		return api.TxnOps{kvOp(&api.KVTxnOp{Verb: api.KVSet, Key: key, Value: op.Value})}
	case kv.OpCreate:
		return api.TxnOps{kvOp(&api.KVTxnOp{Verb: api.KVCAS, Key: key, Value: op.Value, Index: 0})}
	case kv.OpReplace:
		return api.TxnOps{kvOp(&api.KVTxnOp{Verb: api.KVCAS, Key: key, Value: op.Value, Index: op.Version})}
	case kv.OpDelete:
		return api.TxnOps{kvOp(&api.KVTxnOp{Verb: api.KVDelete, Key: key})}
	default: // OpDeleteIf: delete-cas alone would pass if the key is missing
		return api.TxnOps{
			kvOp(&api.KVTxnOp{Verb: api.KVCheckIndex, Key: key, Index: op.Version}),
			kvOp(&api.KVTxnOp{Verb: api.KVDeleteCAS, Key: key, Index: op.Version}),
		}
	}
}

func kvOp(op *api.KVTxnOp) *api.TxnOp { return &api.TxnOp{KV: op} }

// txn runs a transaction. A failed check is ErrConflict or, for the first of ops if fenced is set,
// ErrLeaseLost; a missing permission is ErrDenied. txn makes the request itself, as the client's
// own call loses the status of an answer that is neither 200 nor 409.
func (s *Store) txn(q *api.QueryOptions, ops api.TxnOps, fenced bool) error {
	// Decoding the answer ensures that a page by something other than Consul isn't taken for a success.
	var done api.TxnResponse
	_, err := s.client.Raw().Write("/v1/txn", ops, &done, writeOptions(q))
	var status api.StatusError
	if !errors.As(err, &status) || status.Code != http.StatusConflict {
		return err
	}
	var refused api.TxnResponse
	if err := json.Unmarshal([]byte(status.Body), &refused); err != nil || len(refused.Errors) == 0 {
		return fmt.Errorf("%w: the transaction was refused with status 409, in an answer that is not Consul's: %.200q",
			kv.ErrUnavailable, status.Body)
	}
	// Consul refuses a transaction with 409 for a missing permission as well as for a failed check.
	cause, why := kv.ErrConflict, refused.Errors[0].What
	for _, e := range refused.Errors {
		if strings.Contains(e.What, "Permission denied") || strings.Contains(e.What, "ACL not found") {
			return fmt.Errorf("%w: %s", kv.ErrDenied, e.What)
		}
		if fenced && e.OpIndex == 0 {
			cause, why = kv.ErrLeaseLost, e.What
		}
	}
	return fmt.Errorf("%w: %s", cause, why)
}
