# Who gets which identity, as a file: "assay-server apply -f entries.hcl" makes the server's entries be what
# it says. With -plan it only tells what it would do; with -prune it deletes the owner's entries that are not
# here any more. A key that is commented out shows its default, or an example where there is none.

# Whose entries these are. The ID of an entry is OWNER.NAME, for good, and entries of other owners are never
# touched. (Hints would be no such label: they are handed to workloads.)
owner = "shop-team"

# A node: every agent whose node has proved all of these selectors.
entry "node" {
  node      = true
  spiffe_id = "/node/shop"
  selectors = ["x509pop:subject:cn:node1"]
}

# A workload.
entry "checkout" {
  # A SPIFFE ID, or its path in the server's trust domain.
  spiffe_id = "/shop/checkout"

  # Whose workloads: an agent, a node entry as above, or another entry. node = true stands for the server
  # itself.
  parent_id = "/node/shop"
  #node     = false

  # All of them must be proved.
  selectors = ["unix:uid:1000", "unix:gid:1000"]

  # How long SVIDs live, in place of the server's default.
  #x509_svid_ttl = "1h"
  #jwt_svid_ttl  = "5m"

  # Trust domains whose bundles the workload gets, DNS names for the X509-SVID, and what tells the
  # workload its identities apart.
  #federates_with = ["other.example.com"]
  #dns_names      = ["checkout.example.org"]
  #hint           = "internal"

  # May administer the server; is a server below this one; is to be put into a store outside.
  #admin      = false
  #downstream = false
  #store_svid = false

  # Do not sign the X509-SVID before it is asked for; put a new jti claim into every JWT-SVID.
  #disable_x509_svid_prefetch = false
  #jwt_svid_include_jti       = false

  # When the entry ends.
  #expires_at = "2030-12-31T00:00:00Z"
}
